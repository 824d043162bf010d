"""Answers several requests side by side, from prompt to the end of each text."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn

from tide_mega.data.tokenizer import Tokenizer
from tide_mega.errors import Exit, StatedError
from tide_mega.inference.decoder import Decoder
from tide_mega.inference.model_config import ModelConfig
from tide_mega.inference.sampling import Sampler, Sampling
from tide_mega.inference.text import TextStream


class RequestError(StatedError, ValueError):
    """A request that cannot be answered; others can."""

    exit_status = Exit.DATA


@dataclass(frozen=True)
class Request:
    """A request."""

    prompt: str
    sampling: Sampling
    seed: int
    max_tokens: int
    """Most tokens of the answer."""
    stops: tuple[str, ...] = ()
    """Strings before which the text ends."""
    name: str = "prompt"
    """Its name in errors."""


@dataclass
class Answer:
    """The answer to a request."""

    text: str
    finish: str
    """Why it ended: eos, stop, or length (max_tokens, or no room left)."""
    prompt_tokens: int
    tokens: int
    """Tokens of the answer, including a final eos."""


@dataclass(frozen=True)
class Encoder:
    """Encodes prompts to a decoder's input ids."""

    tokenizer: Tokenizer
    config: ModelConfig
    room: int
    """Most tokens of a prompt and its answer."""

    def encode(self, request: Request) -> list[int]:
        """Return the ids of a prompt; for an empty one the token that begins a document.

        Raises:
            RequestError: there is no room for it and one token of an answer, or no token begins a document.
        """
        ids = [int(i) for i in self.tokenizer.encode_batch([request.prompt])[0]]
        if not ids:
            if self.config.bos_id is None:
                self._refuse(
                    request, "is empty, and the model has no bos_token_id to begin with", "give a text"
                )
            ids = [self.config.bos_id]
        if len(ids) >= self.room:
            most = self.config.shape.max_positions
            remedy = (
                "shorten it" if self.room == most else f"shorten it, or raise max_length, at most to {most:,}"
            )
            why = f"has {len(ids):,} tokens, and with an answer there is room for {self.room:,}"
            self._refuse(request, why, remedy)
        return ids

    def _refuse(self, request: Request, why: str, remedy: str) -> NoReturn:
        raise RequestError(f"{request.name} {why}: {remedy}.")


def answer(
    decoder: Decoder,
    tokenizer: Tokenizer,
    eos_ids: Sequence[int],
    requests: Sequence[Request],
    prompts: Sequence[Sequence[int]],
    write: Callable[[int, str], None],
) -> list[Answer]:
    """Answer requests side by side.

    Args:
        decoder: for at least as many sequences.
        tokenizer: the model's.
        eos_ids: ids that end a text.
        requests: at least one.
        prompts: their ids.
        write: called with a request's number and text whenever there is more.

    Raises:
        GenerationError: logits are not numbers, or the memory can no longer be read.
    """
    sampler = Sampler([r.sampling for r in requests], [r.seed for r in requests], decoder.device)
    streams = [TextStream(tokenizer, request.stops) for request in requests]
    answers = [Answer("", "", len(prompt), 0) for prompt in prompts]
    names = [request.name for request in requests]

    def add(b: int, text: str) -> None:
        if text:
            answers[b].text += text
            write(b, text)

    def end(b: int, why: str) -> None:
        if why != "stop":
            add(b, streams[b].end())
        answers[b].finish = why
        finished.add(b)
        decoder.finish(b)

    finished: set[int] = set()
    logits_BV = decoder.prefill(prompts)
    while True:
        chosen_B = sampler.choose(logits_BV, names, finished)
        for b, token in enumerate(chosen_B.tolist()):
            if b in finished:
                continue
            answers[b].tokens += 1
            if token in eos_ids:
                end(b, "eos")
                continue
            add(b, streams[b].add(token))
            if streams[b].is_stopped:
                end(b, "stop")
            elif answers[b].tokens == requests[b].max_tokens or decoder.lengths[b] == decoder.max_length:
                end(b, "length")
        if len(finished) == len(requests):
            return answers
        logits_BV = decoder.step(chosen_B)
