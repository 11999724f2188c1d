"""The tokenizer of Qwen2.5, where its file is at hand."""

from pathlib import Path

QWEN = Path(__file__).parents[3] / "shared" / "data" / "qwen_tokenizer" / "tokenizer.json"
