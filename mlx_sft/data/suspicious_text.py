"""What broken text looks like: decoded wrongly, cut off, going on as the user, or without an answer in it.

Each test is made to be silent on good text, and so does not find every fault.
"""

from __future__ import annotations

import re

_AFTER_LEAD = "\x80-\x9f¡¢£¤¥¦§¨©ª¬\xad®¯°±²³´µ¶·¸¹º¼½¾¿€‚ƒ„†‡ˆ‰Š‹ŒŽ˜š›œžŸ"
"""What a byte of UTF-8 after the first looks like in Windows-1252, but for the marks that also follow a letter in prose."""
_AFTER_LEAD_OR_MARK = _AFTER_LEAD + "\xa0«»…–—‘’“”•™"
_MOJIBAKE = re.compile(
    "\ufffd|[\x80-\x84\x86-\x9f]|â€|ðŸ|ï»¿|ï¿½|Â[\xa0-\xaa\xac-\xba\xbc-\xbf]"
    f"|Ã[{_AFTER_LEAD}]|(?<![A-ZÀ-ÞĀ-ž])Ã[\xa0«»…–—‘’“”•™]|[ÄÅ](?![²³¹·])[{_AFTER_LEAD}]"
    f"|(?:[ÎÏÐÑØÙ][{_AFTER_LEAD_OR_MARK}]){{3}}|(?:[à-ï][{_AFTER_LEAD_OR_MARK}]{{2}}){{2}}"
)
"""UTF-8 read as Windows-1252: ’ is â€™, é is Ã©, a Cyrillic letter Ð°, a Chinese character three of these."""

_TURN_TOKENS = re.compile(
    r"<\|im_start\|>\s*user|<\|start_header_id\|>\s*user|<start_of_turn>\s*user|<\|(?:user|human|prompter)\|>"
    r"|<｜User｜>|\[INST\]|<<SYS>>|<(?:human|user)>:"
)
_TURN_NAMES = re.compile(
    r"^[ \t]*(?:(?:Human|HUMAN|User|USER)[ \t]*:[ \t]*[^\s{\[]|\#{2,3} ?(?:Instruction|Human|User)\b[ \t]*:)",
    re.MULTILINE,
)
_REFUSAL = re.compile(
    r"\bas an? (?:AI|artificial intelligence|large language|language)\b"
    r"|^(?:I['’]m (?:very |so |really )?sorry|I am sorry|Sorry|I apologi[sz]e|Unfortunately)\W.{0,20}?"
    r"\bI(?: am|['’]m)? (?:cannot|can['’]t|can not|not able to|unable to|won['’]t)\b"
    r"|^I(?: am|['’]m)? (?:cannot|can['’]t|can not|not able to|unable to) (?:assist|help|fulfil|provide|comply|answer|generate)",
    re.IGNORECASE,
)
_OPENING = 160
"""Characters of a reply in which a refusal would stand."""
_FIRST_SYMBOL = 0x2190
"""Arrows, mathematics, pictographs and the scripts of East Asia come from here on."""
_PLACEHOLDERS = frozenset({"n/a", "nan", "null", "undefined", "todo", "tbd", "deleted", "removed"}) | frozenset(
    {"noinput", "nooutput", "no input", "no output", "no response", "placeholder", "your answer here"}
)

_FENCE = re.compile(r"^[ \t]*```", re.MULTILINE)
_NOT_PROSE = re.compile(r"[=`|\\_{}<>~$]|https?:|www\.|[#@]\w|^[#>]|\w\(|\w\.\w+$")
_LIST_ITEM = re.compile(r"(?:[-*+•·–◦▪✓]|\(?\d{1,3}[.):、]|\(?[A-Za-z][.)])\s*|\S+(?: [^\s:：]+){0,5}[:：]")
_SENTENCE_END = re.compile(r"[.!?][\"'”’)*]*\s+[\"'“‘¿¡*(]*[^\W\d_a-z]")
_STOPS = ".!?:;…\"'”’)*`。！？"
_DANGLING = ",;:(["
_OPEN_ENDS = _DANGLING + "-，、：（"
_DANGLING_WORDS = frozenset(
    (
        *(
            "the",
            "a",
            "an",
            "of",
            "and",
            "or",
            "but",
            "because",
            "if",
            "than",
            "with",
            "to",
            "from",
            "as",
            "at",
            "into",
        ),
        *("between", "which", "whose", "while", "such", "including", "however", "its", "their", "your", "our", "my"),
    )
)
_CJK = re.compile("[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff，、：（]")
_CJK_STOP = re.compile("[。！？]")
_SHORTEST_CJK = 15
"""Characters of a last line that is prose, in scripts without spaces."""
_SHORTEST_PROSE = 80
"""Characters of a reply that is prose."""
_FEWEST_WORDS = 8
"""Words of a last line that is prose."""
_FEWEST_DANGLING = 4
"""Words before one that cannot be the last."""
_LONG_SENTENCE = 25
"""Words after which a sentence wants its full stop, even if it is the only one."""


def is_mojibake(text: str) -> bool:
    """Whether it shows UTF-8 that was read as Windows-1252 or Latin-1, or a character that was lost."""
    return not text.isascii() and _MOJIBAKE.search(text) is not None


def is_refusal(reply: str) -> bool:
    """Whether it opens as an AI's refusal."""
    return _REFUSAL.search(reply[:_OPENING]) is not None


def says_nothing(reply: str) -> bool:
    """Whether it has neither letter, digit nor symbol (an emoji is an answer), or is a placeholder such as N/A."""
    if reply.lower().strip("[]()<>.") in _PLACEHOLDERS:
        return True
    return not any(character.isalnum() or ord(character) >= _FIRST_SYMBOL for character in reply)


def has_user_marker(reply: str, user_header: str = "") -> bool:
    """Whether it goes on with a user's turn, in the words of a common template or with this header; code aside."""
    if _TURN_TOKENS.search(reply) or (user_header and user_header in reply):
        return True
    return any(len(_FENCE.findall(reply, 0, name.start())) % 2 == 0 for name in _TURN_NAMES.finditer(reply))


def is_cut_off(reply: str) -> bool:
    """Whether a reply breaks off: an open code block, a comma or word that wants another, or prose without its full stop.

    Lists, titles, code, verses and short answers do without a full stop; they are left alone.
    """
    if "```" in reply:
        if len(_FENCE.findall(reply)) % 2:
            return True
        reply = reply.rpartition("```")[2].strip()
    if not reply or not (reply[-1].isalpha() or reply[-1] in _OPEN_ENDS):
        return False
    before, _, last = reply.rpartition("\n")
    words = last.split()
    if _NOT_PROSE.search(last):
        return False
    if _CJK.match(last[-1]):
        return len(last) >= _SHORTEST_CJK and not _LIST_ITEM.match(last) and bool(_CJK_STOP.search(last))
    if words[-1] in _DANGLING_WORDS:
        return len(words) > _FEWEST_DANGLING
    if len(words) < _FEWEST_WORDS or _LIST_ITEM.match(last):
        return False
    if last[-1] in _DANGLING or last[-1] == "-":
        return True
    if not last[-1].isalpha() or len(reply) < _SHORTEST_PROSE or _is_title(words):
        return False
    paragraph = before.rstrip(" \t\r")
    if paragraph and paragraph[-1] not in "\n" + _STOPS:
        return False  # lines that end as they like: a verse, an address, a list without bullets
    return bool(_SENTENCE_END.search(reply)) or len(words) >= max(_LONG_SENTENCE, 4 * last.count(","))


def _is_title(words: list[str]) -> bool:
    return sum(word[0].isupper() for word in words) > len(words) / 2
