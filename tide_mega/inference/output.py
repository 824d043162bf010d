"""Output of a generation: text or JSON lines to standard output, speed and reads to standard error."""

import json
import sys
from collections.abc import Sequence

from tide_mega.hf.memory_tide import DiskStore
from tide_mega.inference.decoder import Decoder
from tide_mega.inference.session import Answer, Request, RequestError


class Output:
    """Answers in the order of their requests."""

    def __init__(self, is_json: bool, streams: bool) -> None:
        """`streams`: whether requests are answered one at a time, so that text is written as it is generated."""
        self._is_json, self._streams = is_json, streams and not is_json
        self._lines: Sequence[int] = ()
        self._requests: Sequence[Request] = ()
        self._line_open = False
        self.refused = 0
        """Requests that could not be answered."""

    def refuse(self, line: int, error: RequestError) -> None:
        """Report that a request cannot be answered."""
        self.refused += 1
        print(error, file=sys.stderr, flush=True)
        if self._is_json:
            self._write_line({"line": line, "error": str(error)})

    def begin(self, lines: Sequence[int], requests: Sequence[Request]) -> None:
        """Begin a batch of requests."""
        self._lines, self._requests = lines, requests

    def write(self, b: int, text: str) -> None:
        """Write a piece of the answer to request `b` of the batch."""
        if self._streams:
            self._line_open = True
            sys.stdout.write(text)
            sys.stdout.flush()

    def end(self, answers: Sequence[Answer]) -> None:
        """Write the rest of the answers."""
        for line, request, answer in zip(self._lines, self._requests, answers, strict=True):
            if self._is_json:
                self._write_line(
                    {
                        "line": line,
                        "prompt": request.prompt,
                        "text": answer.text,
                        "finish": answer.finish,
                        "prompt_tokens": answer.prompt_tokens,
                        "tokens": answer.tokens,
                        "seed": request.seed,
                    }
                )
                continue
            if not self._streams:
                sys.stdout.write(answer.text)
            self._line_open = True
            self.close()

    def close(self) -> None:
        """End the line of an answer, complete or interrupted."""
        if self._line_open:
            self._line_open = False
            sys.stdout.write("\n")
            sys.stdout.flush()

    def sum_up(self, decoder: Decoder) -> None:
        """Report the speed, and what was read of the memory."""
        stats = decoder.stats
        parts = []
        if stats.prompt_tokens:
            speed = stats.prompt_tokens / stats.prompt_seconds
            parts.append(f"prompts {stats.prompt_tokens:,} tokens, {speed:,.1f} tokens/s")
        if stats.tokens:
            each = 1e3 * stats.step_seconds / stats.steps
            speed = stats.tokens / stats.step_seconds
            parts.append(f"answers {stats.tokens:,} tokens, {speed:,.1f} tokens/s, {each:,.2f} ms a step")
        store = decoder.weights.memory
        if isinstance(store, DiskStore):
            asked = store.stats.hits + store.stats.misses
            part = store.stats.hits / asked if asked else 0.0
            parts.append(
                f"memory on disk: {part:.1%} of {asked:,} rows from the cache, {store.stats.bytes_read:,} bytes "
                f"read, {1e3 * store.stats.seconds_waited:,.1f} ms waited"
            )
        if parts:
            print("; ".join(parts), file=sys.stderr, flush=True)

    def _write_line(self, line: dict[str, object]) -> None:
        sys.stdout.write(json.dumps(line, ensure_ascii=False) + "\n")
        sys.stdout.flush()
