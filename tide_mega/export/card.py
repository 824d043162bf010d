"""Writes the README.md of an exported folder: what the model is, its results, how to load it."""

import json
from dataclasses import dataclass
from typing import Any

from tide_mega.config.schema import TideConfig
from tide_mega.config.sizes import count_parameters
from tide_mega.export.options import Choice
from tide_mega.hf.rows_tide import RowFormat

_FORMATS = {
    "fp32": "rows in fp32",
    "bf16": "rows in bf16",
    "int8": "rows in int8, a bf16 scale for each",
    "int4": "rows in int4, a bf16 scale for 32 elements",
    "nf4": "rows in NF4, a bf16 scale for 64 elements",
}
_BINS = {"rare": "rare (deciles 1–3)", "mid": "middle (4–7)", "common": "common (8–10)"}
_MISSING = "to be filled in by whoever publishes the model"


@dataclass(frozen=True)
class Card:
    """Contents of a model card."""

    name: str
    license: str | None
    config: TideConfig
    choice: Choice
    step: int
    tokens: int
    """Training tokens consumed."""
    evaluation: dict[str, Any] | None
    """Last evaluation record on held-out text up to the step; None if there is none."""
    row_format: RowFormat | None
    """None for K = 0."""

    def text(self) -> str:
        """Return the card's text."""
        sections = [
            self._header(),
            self._title(),
            self._facts(),
            self._losses(),
            self._loading(),
            self._limits(),
        ]
        return "\n\n".join(section for section in sections if section) + "\n"

    @property
    def _blocks(self) -> int:
        return self.config.memory.num_blocks

    def _header(self) -> str:
        tags = (
            ["text-generation", "llama"] if not self._blocks else ["text-generation", "tide", "custom_code"]
        )
        fields = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": tags}
        if self.license is not None:
            fields = {"license": self.license, **fields}
        lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in fields.items()]
        return "\n".join(["---", *lines, "---"])

    def _title(self) -> str:
        if not self._blocks:
            what = (
                "A LLaMA-style language model without memory tables: the baseline (K = 0) of a TIDE training."
            )
        else:
            what = (
                f"A TIDE language model with K = {self._blocks} memory tables: each holds a row for every token "
                "of the vocabulary, and every layer adds a mixture of the rows of the token at hand, which a "
                "router weighs, with a null bank beside them "
                "([arXiv 2605.06216](https://arxiv.org/abs/2605.06216))."
            )
        return f"# {self.name}\n\n{what}"

    def _facts(self) -> str:
        model, count = self.config.model, count_parameters(self.config.model, self.config.memory)
        lines = [
            ("K", f"{self._blocks}"),
            ("Parameters", f"{count.total:,}"),
            ("of which memory tables", f"{count.tables:,}"),
            ("Training tokens", f"{self.tokens:,}"),
            ("Optimizer steps", f"{self.step:,}"),
            ("Layers, width, heads, key/value heads", _shape_of(self.config)),
            ("Context trained on", f"{self.config.data.seq_length:,} tokens"),
            ("Vocabulary", f"{model.vocab_size:,}"),
            ("Weights", self.choice.dtype),
        ]
        if self.row_format is not None:
            lines.append(("Memory", self._memory(self.row_format)))
        lines.append(("License", self.license or _MISSING))
        return "| | |\n|---|---|\n" + "\n".join(f"| {key} | {value} |" for key, value in lines)

    def _memory(self, row_format: RowFormat) -> str:
        if self.choice.is_trained:
            return f"tables as trained, {self.choice.tables}, among the weights; they can be trained on"
        stored = _FORMATS.get(row_format.kind) or (
            f"{row_format.rank} coefficients a token in bf16, of a basis that all tokens share"
        )
        place = "among the weights" if self.choice.memory == "inline" else "in `memory.tide`"
        return f"normalised, {stored}, {place}"

    def _losses(self) -> str:
        found = self.evaluation
        if found is None or not _is_number(found.get("loss")):
            return "## Held-out loss\n\nThe training evaluated on no held-out text."
        lines = [
            f"## Held-out loss\n\nAt step {found['step']:,}, in nats per token, by how often the token to be "
            "predicted occurs in the training text (decile 1 has the rarest):\n",
            "| tokens | loss |",
            "|---|---:|",
            f"| all | {found['loss']:.4f} |",
        ]
        by_bin = found.get("loss_by_bin")
        rows = [(title, found.get(key)) for key, title in _BINS.items()]
        rows += [(_slot(slot), loss) for slot, loss in (by_bin if isinstance(by_bin, dict) else {}).items()]
        return "\n".join([*lines, *(f"| {title} | {loss:.4f} |" for title, loss in rows if _is_number(loss))])

    def _loading(self) -> str:
        trust = ", trust_remote_code=True" if self._blocks else ""
        note = (
            "The model's code is in this folder (`modeling_tide.py`): `trust_remote_code=True` runs it; without "
            "it, loading asks on the terminal.\n\n"
            if self._blocks
            else ""
        )
        return (
            "## Loading\n\n```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f'path = "..."  # this folder\nmodel = AutoModelForCausalLM.from_pretrained(path{trust})\n'
            f"tokenizer = AutoTokenizer.from_pretrained(path{trust})\n"
            'inputs = tokenizer("Once upon a time", return_tensors="pt")\n'
            "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))\n```\n\n"
            f"{note}Documents are separated by the end-of-document token, which also begins a text: prompt with "
            "it alone to have one written from its beginning."
        )

    def _limits(self) -> str:
        lines = ["A base model: it continues text, and was not tuned to follow instructions or to be safe."]
        if self._blocks:
            lines.append("It reads its memory by token id, so `inputs_embeds` without ids is refused.")
            if self.choice.memory == "sidecar":
                lines.append(
                    "The memory is a file with a row for each token: the vocabulary cannot be resized."
                )
            elif not self.choice.is_trained:
                lines.append("The memory is quantised: it cannot be trained on, all else can.")
        return "## Limits\n\n" + "\n".join(f"- {line}" for line in lines)


def _shape_of(config: TideConfig) -> str:
    model = config.model
    sizes = (model.num_layers, model.hidden_size, model.num_attention_heads, model.num_query_groups)
    return ", ".join(f"{size:,}" for size in sizes)


def _slot(slot: str) -> str:
    return f"decile {int(slot) + 1}" if slot.isdigit() else slot


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
