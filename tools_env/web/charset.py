"""Decodes the bytes of a page, even when its declared charset is wrong."""

import codecs
import re

_META = re.compile(rb"<(?:meta|\?xml)\b[^>]{0,200}?(?:charset|encoding)\s*=\s*[\"']?\s*([\w-]{2,40})", re.IGNORECASE)
_MARKS = ((b"\xef\xbb\xbf", "utf-8"), (b"\xff\xfe", "utf-16-le"), (b"\xfe\xff", "utf-16-be"))
# Supersets that browsers use for these names.
_MEANT = {
    "gb2312": "gb18030",
    "gbk": "gb18030",
    "big5": "big5hkscs",
    "shift_jis": "cp932",
    "iso8859-1": "cp1252",
    "ascii": "cp1252",
    "euc_kr": "cp949",
}
_NEVER = frozenset({"idna", "punycode", "unicode_escape", "raw_unicode_escape", "undefined", "utf-7"})
_MAX_BROKEN = 0.01  # share of undecodable characters above which a declared charset is rejected
_SAMPLE = 1 << 15  # bytes that are examined for a guess
# Frequent characters of Chinese, simplified and traditional, and the Japanese syllables.
_COMMON = frozenset(
    "的一是不了在人有我他这个们中来上大为和国地到以说时要就出会可也你对生能而子那得于着下自之年过发后作里用道行所然"
    "家种事成方多经么去法学如都同现当没动面起看定天分还进好小部其些主样理心本前开但因只从想实日這個們來為國說時會對"
    "發後裡種經麼學現當沒動還進樣開從實與長關點業將兩間問並應戰頭體見產門東聲員論處義幾條氣題爾別變總電數報結場計"
)
_KANA = re.compile("[\u3040-\u30ff]")


def decode_body(body: bytes, charset: str | None) -> str:
    """Returns a page's text. `charset`: the header's; the page's own declaration and a guess follow.

    Valid UTF-8 is decoded as UTF-8 whatever is declared: other charsets are valid UTF-8 only for very short texts.
    """
    for mark, name in _MARKS:
        if body.startswith(mark):
            return body[len(mark) :].decode(name, "replace")
    found = _META.search(body[:4096])
    told = [name for name in map(_codec, (charset, found and found.group(1).decode())) if name]
    try:
        content = body.decode("utf-8")
        if not told or told[0] == "utf-8" or sum(c > "\x7f" for c in content) > 3:
            return content
    except UnicodeDecodeError:
        pass
    for name in told:
        content = body.decode(name, "replace")
        if _whole(content):
            return content
    return body.decode(_guess(body), "replace")


def _codec(name: str | None) -> str | None:
    try:
        known = codecs.lookup(name or "").name
        return _MEANT.get(known, known) if codecs.lookup(known)._is_text_encoding and known not in _NEVER else None
    except (LookupError, ValueError):
        return None


def _whole(content: str) -> bool:
    return content.count("\ufffd") <= max(1, _MAX_BROKEN * len(content))


def _guess(body: bytes) -> str:
    """Returns the guessed charset of text that is not UTF-8 and declares no usable charset."""
    broken = body.decode("utf-8", "replace")
    if _whole(broken) and len(broken) < len(body):
        return "utf-8"
    sample = body[:_SAMPLE]
    for name, common in (("cp932", _KANA.match), ("euc_jp", _KANA.match), ("gb18030", None), ("big5hkscs", None)):
        wide = [c for c in sample.decode(name, "replace") if c > "\x7f"]
        likely = sum(bool(common(c)) if common else c in _COMMON for c in wide)
        if likely > 0.15 * len(wide) and wide.count("\ufffd") <= 0.05 * len(wide):
            return name
    import charset_normalizer

    best = charset_normalizer.from_bytes(sample).best()
    return best.encoding if best is not None else "cp1252"
