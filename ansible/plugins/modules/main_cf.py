#!/usr/bin/python
"""Plug settings into Postfix's main.cf, and take them out again without a trace."""

from __future__ import annotations

DOCUMENTATION = """
module: main_cf
author: The bascule developers
version_added: "0.2.0"
short_description: Adds settings to a main.cf that others have written, and removes them exactly
description:
  - Adds a block of parameters named C(bascule_...) at the end of Postfix's C(main.cf), and has others refer to them.
  - C(NAME = $bascule_NAME, ...) in the block puts the reference in front of what the file says of C(NAME);
    C(NAME = ..., $bascule_NAME) puts it behind. The owner's line stays where it is and is edited as before.
    In lists of restrictions, behind means before the first restriction that would accept any recipient.
  - C(NAME = $bascule_NAME) is for a parameter that its owner has not set. Otherwise it is left out, and so is
    C(bascule_NAME).
  - With O(state=absent) the file is again what it was, byte for byte, with whatever was edited meanwhile.
options:
  path:
    description: The file.
    type: path
    default: /etc/postfix/main.cf
  block:
    description: Comments that begin with C(# bascule:), and assignments, as in main.cf.
    type: str
    default: ""
  defaults:
    description: Values of Postfix's own (C(postconf -d)) that go on behind ours where the owner has set nothing.
    type: dict
    default: {}
  state:
    description: Whether the block is there.
    type: str
    choices: [present, absent]
    default: present
attributes:
  check_mode:
    support: full
    description: Tells what would change.
  diff_mode:
    support: full
    description: Shows it.
"""

EXAMPLES = """
- name: Ask bascule first
  bascule.mail.main_cf:
    block: |
      bascule_transport_maps = socketmap:unix:bascule/socketmap:transport
      transport_maps = $bascule_transport_maps, ...
"""

RETURN = """
extended:
  description: Parameters of the owner's that refer to ours now.
  returned: always
  type: list
  elements: str
kept:
  description: Parameters that the owner has set otherwise, and that were left alone.
  returned: always
  type: list
  elements: str
"""

import re
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule

OURS = "bascule_"
COMMENT = "# bascule"
BEGIN = (
    "# bascule: begin. Written by Ansible; what is yours stays in your own lines and refers to these by $bascule_..."
)
#: The same, where the file had no newline at its end.
BEGIN_NO_NEWLINE = f"{BEGIN} "
END = "# bascule: end"
#: Where they are not set everybody may, and needs no word of ours.
ONLY_WHERE_SET = ("authorized_mailq_users", "authorized_flush_users")
#: Restrictions that accept a recipient of ours, whoever sends (postconf(5), smtpd_recipient_restrictions).
ACCEPTING = ("permit", "permit_auth_destination", "permit_mx_backup")

#: The first release renamed the owner's lines, and put ours in their place.
FORMER = "bascule_former_"
FORMER_BEGIN = "# bascule: begin. What follows is written by Ansible; former values are above, as bascule_former_..."
FORMER_PLAIN = (
    "unverified_recipient_reject_code = 550",
    "unverified_recipient_reject_reason = no such user here",
    "address_verify_sender =",
    "address_verify_poll_delay = 1s",
    "address_verify_negative_refresh_time = 10m",
    "address_verify_negative_expire_time = 1h",
    "smtputf8_enable = no",
    "recipient_delimiter = +",
)

#: What Postfix takes for white space (isspace(3)); only a newline ends one of its lines.
_SPACE = " \t\n\v\f\r"
_LINE = re.compile(r"[^\n]*\n|[^\n]+")
#: The name may have a line of its own: white space in front of the "=" goes on with it.
_ASSIGNMENT = re.compile(r"([A-Za-z0-9_.-]+)[ \t\n\v\f\r]*=[ \t]*")
#: What ``postconf -#`` makes of an assignment; lines that went on with it begin with ``#`` and white space then.
_PUT_OUT = re.compile(r"#[A-Za-z0-9_]+[ \t]*=")
_REFERENCE = rf"\${OURS}[A-Za-z0-9_]+"
_USE = re.compile(rf"{_REFERENCE}(, {_REFERENCE})*")
_IN_FRONT = re.compile(rf"{_REFERENCE},[ \t]?")
_BEHIND = re.compile(rf"(,[ \t]*)?{_REFERENCE}")


class Entry:
    """A logical line of main.cf (postconf(5)) with what comments stand inside, or a comment or empty line alone."""

    def __init__(self, text: str, name: str = "") -> None:
        self.text = text
        self.name = name

    @property
    def value(self) -> str:
        """What is assigned, without comments, in one line."""
        found = _ASSIGNMENT.match(self.text)
        if found is None:
            return ""
        lines = _LINE.findall(self.text[found.end() :])
        return " ".join(line.strip(_SPACE) for line in lines if not _is_comment(line)).strip(_SPACE)


def entries(text: str) -> list[Entry]:
    """The file in logical lines; their texts together are ``text``."""
    found: list[Entry] = []
    last: int | None = None  # the logical line that a line with white space in front goes on
    for line in _LINE.findall(text):
        if _is_comment(line):
            found.append(Entry(line))
        elif line[0] in _SPACE and last is not None:
            found[last].text += "".join(between.text for between in found[last + 1 :]) + line
            del found[last + 1 :]
        else:
            last = len(found)
            found.append(Entry(line))
    for entry in found:
        assignment = _ASSIGNMENT.match(entry.text)
        entry.name = assignment[1] if assignment else ""
    return found


def _is_comment(line: str) -> bool:
    """Whether Postfix passes over it, between the lines of a logical line, too: a comment, or nothing."""
    return not line.strip(_SPACE) or line.lstrip(_SPACE).startswith("#")


def without_block(text: str) -> str:
    """The text as it was before :func:`with_block`; whatever was edited stays."""
    kept: list[str] = []
    missing_newline = inside = former = put_out = False
    for entry in entries(text):
        goes_on = put_out and entry.text[:2] in {"# ", "#\t"}
        put_out = goes_on or bool(_PUT_OUT.match(entry.text))
        line = entry.text.rstrip("\n")
        if line.rstrip(" ") in {BEGIN, FORMER_BEGIN}:
            inside, former = True, line.startswith(FORMER_BEGIN)
            missing_newline = line.endswith(" ")
        elif line == END:
            inside = former = False
        elif not _is_ours(entry, inside=inside, former=former):
            kept.append(_without_references(entry, put_out=put_out))
            missing_newline = False  # something was added behind
    result = "".join(kept)
    return result.removesuffix("\n") if missing_newline else result


def _is_ours(entry: Entry, *, inside: bool, former: bool) -> bool:
    if former:
        # Whoever has written a line of the former block anew has taken ours out of it.
        plain = " ".join(entry.text.split())
        return not entry.name or "bascule" in entry.text or plain in FORMER_PLAIN
    if entry.name.startswith(OURS):
        return not entry.name.startswith(FORMER)
    if entry.name:
        return bool(_USE.fullmatch(entry.value)) and entry.text.count("\n") <= 1
    return inside and entry.text.startswith(COMMENT)


def _without_references(entry: Entry, *, put_out: bool) -> str:
    text = entry.text
    if entry.name.startswith(FORMER):
        return text.removeprefix(FORMER)
    if not entry.name and not put_out:
        return text
    return _BEHIND.sub("", _IN_FRONT.sub("", text))


def with_block(text: str, block: str, defaults: dict[str, str] | None = None) -> tuple[str, list[str], list[str]]:
    """``text``, which has no block, with ``block`` at its end; the parameters that are extended, and those kept.

    ``defaults`` are what Postfix says where nobody has set a parameter: they go on behind ours.
    """
    there = entries(text)
    present = {entry.name: entry for entry in there if entry.name}  # of several, Postfix takes the last
    extended: list[str] = []
    left_out: list[str] = []
    ours: list[Entry] = []
    for entry in entries(block):
        if entry.name and not entry.name.startswith(OURS):
            front, dots, behind = entry.value.partition("...")
            if entry.name in present and dots:
                present[entry.name].text = _woven(present[entry.name].text, front.strip(" ,"), behind.strip(" ,"))
                extended.append(entry.name)
                continue
            if entry.name in present or entry.name in ONLY_WHERE_SET:
                left_out.append(entry.name)
                continue
            uses = ", ".join(each.strip(" ,") for each in (front, behind) if each.strip(" ,"))
            ours.append(Entry(f"{entry.name} = {uses}\n", entry.name))
            continue
        ours.append(entry)
    for entry in ours:
        default = (defaults or {}).get(entry.name.removeprefix(OURS), "")
        if default and entry.name.startswith(OURS) and entry.name.removeprefix(OURS) not in present:
            entry.text = f"{entry.text.rstrip()}, {default}\n"
    unused = {f"{OURS}{name}" for name in left_out}
    body = "".join(entry.text for entry in ours if entry.name not in unused)
    head = "".join(entry.text for entry in there)
    begin = BEGIN
    if head and not head.endswith("\n"):
        head, begin = f"{head}\n", BEGIN_NO_NEWLINE
    kept = [name for name in left_out if name in present]
    return f"{head}{begin}\n{body}{END}\n", extended, kept


def _woven(text: str, front: str, behind: str) -> str:
    """A logical line with a reference in front of its value, and one behind."""
    assignment = _ASSIGNMENT.match(text)
    if assignment is None:
        raise ValueError(f"no assignment: {text!r}")
    if behind:
        place, at_end = _place_behind(text, assignment.end())
        text = text[:place] + (f", {behind}" if at_end else f"{behind}, ") + text[place:]
    if front:
        text = f"{text[: assignment.end()]}{front}, {text[assignment.end() :]}"
    return text


def _place_behind(text: str, start: int) -> tuple[int, bool]:
    """Before the first restriction that would accept any recipient, or at the end of the value (True)."""
    end, depth, position = start, 0, start
    for line in _LINE.findall(text[start:]):
        if position == start or not _is_comment(line):
            for word in re.finditer(r"[{}]|[^\s,{}]+", line):
                depth += {"{": 1, "}": -1}.get(word[0], 0)
                if depth == 0 and word[0] in ACCEPTING:
                    return position + word.start(), False
            if line.strip(_SPACE):
                end = position + len(line.rstrip(_SPACE))
        position += len(line)
    return end, True


def main() -> None:
    """Run as an Ansible module."""
    module = AnsibleModule(
        argument_spec={
            "path": {"type": "path", "default": "/etc/postfix/main.cf"},
            "block": {"type": "str", "default": ""},
            "defaults": {"type": "dict", "default": {}},
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
        },
        supports_check_mode=True,
    )
    path = Path(module.params["path"])
    try:
        before = path.read_bytes().decode("utf-8", "surrogateescape")
        after = without_block(before)
    except OSError as error:
        module.fail_json(msg=f"{path} was left as it is: {error}")
        return
    extended: list[str] = []
    kept: list[str] = []
    if module.params["state"] == "present":
        after, extended, kept = with_block(after, module.params["block"], module.params["defaults"])
    if after != before and not module.check_mode:
        new = Path(module.tmpdir) / "main.cf"
        new.write_bytes(after.encode("utf-8", "surrogateescape"))
        module.atomic_move(str(new), str(path))
    diff = {"before": before, "after": after, "before_header": str(path), "after_header": str(path)}
    module.exit_json(changed=after != before, extended=extended, kept=kept, diff=diff)


if __name__ == "__main__":
    main()
