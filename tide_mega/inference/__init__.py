"""From an exported folder to text: folder checks, decoding and sampling, without transformers."""
