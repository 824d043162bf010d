"""From an exported folder to text: the folder's checks, a decode path sampling; no transformers."""
