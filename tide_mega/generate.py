"""Generates text from an exported folder.

    python -m tide_mega.generate model=hf/ prompt="The import statement"
    python -m tide_mega.generate model=hf/ prompt="def " max_tokens=200 temperature=0.8 top_p=0.95 seed=1
    python -m tide_mega.generate model=hf/ prompts=prompts.txt batch=8 > answers.jsonl
    python -m tide_mega.generate model=hf/ memory=disk cache=0.05 < prompts.jsonl

Writes only the answer to standard output, as it is generated, and at the end the speed and what was read of the
memory to standard error. Needs no transformers.

In a file of prompts, or on standard input, each line is a prompt, or a JSON object with `prompt` and any of
max_tokens, temperature, top_k, top_p, seed and stop; blank lines are skipped. Each answer is a JSON line: line (a
number), prompt, text, finish (eos, stop or length), prompt_tokens, tokens and seed; or line and error.

Exit status: 0 success; 1 logits are not numbers, or the memory can no longer be read; 2 a wrong argument; 3 the
folder is unusable, or some prompts could not be answered (the others were); 130 after Ctrl-C; 141 when the reader
of standard output has gone.
"""

import sys
from itertools import islice
from typing import Any

from tide_mega.config.command_line import hush_libraries, tool_entry, use_huge_pages
from tide_mega.config.hydra_door import parse_tool_cli
from tide_mega.errors import ConfigError, Exit
from tide_mega.inference.options import GenerateOptions, check

INTERRUPTED = 128 + 2
"""Exit status after Ctrl-C: a shell's for SIGINT."""
_LONGEST = 4096


def main(arguments: list[str] | None = None) -> int:
    """Run the generation; return the exit status."""
    options: Any = parse_tool_cli(GenerateOptions, arguments, doc=__doc__ or "")
    check(options)
    try:
        return generate(options)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr, flush=True)
        return INTERRUPTED


def generate(options: GenerateOptions) -> int:
    """Answer all requests; return the exit status.

    Raises:
        ConfigError: an argument is wrong.
        FolderError: the folder cannot be used.
        RequestError: `prompt` cannot be answered.
        GenerationError: generation cannot continue.
    """
    hush_libraries()
    use_huge_pages()
    # Imported late: `--help` and a wrong key should not wait for torch.
    from tide_mega.inference.decoder import Decoder
    from tide_mega.inference.folder import ModelFolder
    from tide_mega.inference.matrices import has_int8
    from tide_mega.inference.output import Output
    from tide_mega.inference.requests import read_requests, request_of
    from tide_mega.inference.session import Encoder, Request, RequestError, answer
    from tide_mega.parallel.device import choose_device, set_threads

    requests = read_requests(options)
    folder = ModelFolder.open(options.model)
    device = choose_device(options.device, 0)
    if options.weights == "int8" and (device.is_cuda or options.compile or not has_int8()):
        raise ConfigError("weights=int8 is for a CPU with oneDNN, without compile: use weights=dtype.")
    set_threads(options.threads, 1)
    most = folder.config.shape.max_positions
    if options.max_length is not None and options.max_length > most:
        raise ConfigError(
            f"max_length={options.max_length} is beyond the model's {most:,}: use at most {most:,}."
        )
    encoder = Encoder(folder.tokenizer, folder.config, options.max_length or min(most, _LONGEST))
    room = encoder.room
    if options.prompt is not None:
        only = request_of({"prompt": options.prompt}, options, "prompt")
        room = min(room, len(encoder.encode(only)) + only.max_tokens)
    dtype = ("bf16" if device.has_fast_bf16() else "fp32") if options.dtype == "auto" else options.dtype
    decoder = Decoder.open(
        folder,
        device=device.torch_device,
        dtype=dtype,
        memory=options.memory,
        cache=options.cache,
        max_length=room,
        batch=options.batch if options.prompt is None else 1,
        weights=options.weights,
        compile=options.compile,
    )
    is_json = options.json if options.json is not None else options.prompt is None
    output = Output(is_json, streams=options.batch == 1 or options.prompt is not None)
    try:
        while several := list(islice(requests, options.batch)):
            asked: list[tuple[int, Request, list[int]]] = []
            for line, request in several:
                try:
                    if isinstance(request, RequestError):
                        raise request
                    asked.append((line, request, encoder.encode(request)))
                except RequestError as error:
                    output.refuse(line, error)
            if asked:
                lines, found, prompts = zip(*asked, strict=True)
                output.begin(lines, found)
                answers = answer(
                    decoder, folder.tokenizer, folder.config.eos_ids, found, prompts, output.write
                )
                output.end(answers)
    finally:
        output.close()
        output.sum_up(decoder)
        decoder.close()
    return Exit.DATA if output.refused else Exit.DONE


if __name__ == "__main__":
    tool_entry(main)
