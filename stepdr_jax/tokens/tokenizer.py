"""Byte-level BPE with Qwen2.5's pre-tokenisation and added tokens: trained here, or read from a Qwen tokenizer.json.

Ordinary text and control tokens never mix: `encode` works on a BPE without added tokens, so no text, whatever it says,
can become a control id. Control ids are placed by `tokens.chat` alone.
"""

import functools
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from functools import cached_property

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from stepdr_jax import files
from stepdr_jax.errors import UserError

# Qwen2.5 tokenizer.json, pre_tokenizer: words take one leading non-letter, digits stand alone, newlines close a group.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Qwen2.5 tokenizer.json, added_tokens, in id order; `special` ones are dropped when ids are shown as text.
SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
NOT_SPECIAL = (
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
)
ADDED = SPECIAL + NOT_SPECIAL
# Bytes in a learned token. Chinese has no spaces, so without a limit a small corpus turns whole phrases, the answer
# included, into one token; 12 bytes are four characters, or an English word.
LONGEST = 12
SHORT = 256  # characters up to which `encode` remembers a text


def _unicode(text: str) -> str:
    """Replaces unpaired surrogates (JSON escapes in web pages make them), which have no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


class Tokenizer:
    """A BPE over bytes plus the control tokens that follow its vocabulary. Make one with `train` or `load`.

    Attributes:
        vocab_size: ids are in [0, vocab_size), control tokens included.
        endoftext, im_start, im_end, tool_call_start, tool_call_end: control ids.
    """

    def __init__(self, bpe: tokenizers.Tokenizer, control: dict[str, int]):
        """Args: bpe has no added tokens; control maps each of `ADDED` to an id outside the BPE's vocabulary."""
        self._bpe = bpe
        self.control = dict(control)
        # Headers, newlines and system prompts come back in every episode.
        self._short = functools.lru_cache(maxsize=4096)(lambda text: tuple(self.encode_batch([text])[0]))
        self.endoftext = control["<|endoftext|>"]
        self.im_start = control["<|im_start|>"]
        self.im_end = control["<|im_end|>"]
        self.tool_call_start = control["<tool_call>"]
        self.tool_call_end = control["</tool_call>"]
        self.vocab_size = max(bpe.get_vocab_size(), max(control.values()) + 1)

    @staticmethod
    def train(texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Learns merges from `texts`; the same texts give the same tokenizer. Seconds for tens of megabytes.

        The result has at most `vocab_size` ids, control tokens included; fewer when the texts run out of pairs that
        occur twice. Raises UserError when `vocab_size` has no room for 256 bytes and the control tokens.
        """
        smallest = 256 + len(ADDED)
        if vocab_size < smallest:
            raise UserError(
                f"expected tokenizer.vocab_size >= {smallest} (256 bytes and {len(ADDED)} control tokens), "
                f"got {vocab_size}; raise it in the config"
            )
        bpe = tokenizers.Tokenizer(models.BPE())
        bpe.normalizer = normalizers.NFC()
        bpe.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(tokenizers.Regex(PATTERN), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        bpe.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - len(ADDED),
            min_frequency=2,
            max_token_length=LONGEST,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        bpe.train_from_iterator(map(_unicode, texts), trainer)
        size = bpe.get_vocab_size()
        return Tokenizer(bpe, {text: size + index for index, text in enumerate(ADDED)})

    @staticmethod
    def load(path: str | os.PathLike) -> "Tokenizer":
        """Reads a Hugging Face tokenizer.json, ours or Qwen2.5's. Raises UserError when it is not one."""
        spec = files.read_json(path)
        if not isinstance(spec, dict) or spec.get("model", {}).get("type") != "BPE":
            raise UserError(f"expected a tokenizer.json with a BPE model in {path}; train one or copy Qwen2.5's")
        control = {token["content"]: token["id"] for token in spec.get("added_tokens") or []}
        missing = [text for text in ADDED if text not in control]
        if missing:
            raise UserError(
                f"expected Qwen2.5's control tokens in {path}, but {', '.join(missing[:3])} "
                f"({len(missing)} in all) are absent; use a Qwen2.5 tokenizer or train one"
            )
        inside = [text for text, id_ in control.items() if id_ < len(spec["model"]["vocab"])]
        if inside:
            raise UserError(f"expected control tokens after the vocabulary in {path}, but {inside[0]} is inside it")
        bpe = tokenizers.Tokenizer.from_str(json.dumps(spec | {"added_tokens": []}))
        return Tokenizer(bpe, control)

    def save(self, path: str | os.PathLike) -> None:
        """Writes a tokenizer.json that Hugging Face libraries read, atomically."""
        files.write_atomic(path, self._json)

    @cached_property
    def _json(self) -> str:
        spec = json.loads(self._bpe.to_str())
        flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False)
        spec["added_tokens"] = [
            dict(id=id_, content=text, special=text not in NOT_SPECIAL, **flags)
            for text, id_ in sorted(self.control.items(), key=lambda item: item[1])
        ]
        return json.dumps(spec, ensure_ascii=False)

    def fingerprint(self) -> str:
        """Returns 16 hex digits that change when any id changes its meaning."""
        spec = json.loads(self._json)
        kept = [spec["model"]["vocab"], spec["model"]["merges"], spec["normalizer"], spec["pre_tokenizer"]]
        payload = json.dumps([*kept, sorted(self.control.items())], sort_keys=True).encode()
        return hashlib.blake2b(payload, digest_size=8).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Returns ids of `text` as ordinary text: never a control id, even for the text "<|im_end|>"."""
        if len(text) > SHORT:
            return self.encode_batch([text])[0]
        return list(self._short(text))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` for many texts at once, in order."""
        return [encoding.ids for encoding in self._bpe.encode_batch_fast([_unicode(text) for text in texts])]

    @cached_property
    def _bytes_of(self) -> dict[int, bytes]:
        """Ordinary id -> the bytes it stands for (the inverse of GPT-2's printable byte alphabet)."""
        printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        byte_of = {chr(byte): byte for byte in printable}
        others = [byte for byte in range(256) if byte not in set(printable)]
        byte_of |= {chr(0x100 + index): byte for index, byte in enumerate(others)}
        return {id_: bytes(byte_of[c] for c in text) for text, id_ in self._bpe.get_vocab().items()}

    def piece(self, id_: int) -> bytes:
        """Returns the bytes of one id: of a token (not always whole characters), or of a control token's text.

        Ids outside the vocabulary are U+FFFD, as in `decode`.
        """
        piece = self._bytes_of.get(id_)
        return self._control_text.get(id_, "\ufffd").encode() if piece is None else piece

    @cached_property
    def _control_text(self) -> dict[int, str]:
        return {id_: text for text, id_ in self.control.items()}

    def decode(self, ids: Iterable[int], *, special: bool = False) -> str:
        """Returns the text of `ids`. Bytes that are not UTF-8 and ids outside the vocabulary become U+FFFD.

        Args:
            special: show <|im_start|>, <|im_end|> and the like too; <tool_call> and </tool_call> always show.
        """
        parts = []
        for id_ in ids:
            if (piece := self._bytes_of.get(id_)) is not None:
                parts.append(piece)
            elif (text := self._control_text.get(id_)) is None:
                parts.append("\ufffd".encode())
            elif special or text in NOT_SPECIAL:
                parts.append(text.encode())
        return b"".join(parts).decode("utf-8", "replace")
