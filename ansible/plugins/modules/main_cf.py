#!/usr/bin/python
"""Plug settings into Postfix's main.cf, and take them out again without a trace."""

from __future__ import annotations

DOCUMENTATION = """
module: main_cf
author: The bascule developers
version_added: "0.2.0"
short_description: Adds settings to a main.cf that others have written, and removes them exactly
description:
  - Adds a block of parameters at the end of Postfix's C(main.cf).
  - A parameter whose value in the block refers to C($bascule_former_NAME) extends what is set before. The former
    assignment goes on under the name C(bascule_former_NAME), where its owner may edit it.
  - Any other parameter that is set before keeps its former value, and is left out of the block.
  - With O(state=absent) the file is again what it was, byte for byte, with whatever was edited meanwhile.
options:
  path:
    description: The file.
    type: path
    default: /etc/postfix/main.cf
  block:
    description: Comments and assignments, as in main.cf.
    type: str
    default: ""
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
      transport_maps = socketmap:unix:bascule/socketmap:transport $bascule_former_transport_maps
"""

RETURN = """
extended:
  description: Parameters whose former value is asked after ours.
  returned: always
  type: list
  elements: str
kept:
  description: Parameters that the operator has set otherwise, and that were left alone.
  returned: always
  type: list
  elements: str
"""

import re
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule

BEGIN = "# bascule: begin. What follows is written by Ansible; former values are above, as bascule_former_..."
#: The same, where the file had no newline at its end.
BEGIN_NO_NEWLINE = f"{BEGIN} "
END = "# bascule: end"
FORMER = "bascule_former_"

_ASSIGNMENT = re.compile(r"([A-Za-z0-9_]+)[ \t]*=")
_REFERENCE = re.compile(rf"[ \t]*,?[ \t]*\${FORMER}([A-Za-z0-9_]+)")


def without_block(text: str) -> str:
    """The text as it was before :func:`with_block`; edits outside the block stay."""
    for begin, newline in ((BEGIN, "\n"), (BEGIN_NO_NEWLINE, "")):
        head, found, rest = _cut(text, f"{begin}\n")
        if found:
            _, ended, tail = rest.partition(f"{END}\n")
            if not ended:
                raise ValueError(f"a line {END!r} is missing")
            head = head if newline or tail else head.removesuffix("\n")
            text = head + tail
    return re.sub(rf"^{FORMER}(?=[A-Za-z0-9_]+[ \t]*=)", "", text, flags=re.MULTILINE)


def _cut(text: str, line: str) -> tuple[str, bool, str]:
    """What stands before and after a whole line."""
    if text.startswith(line):
        return "", True, text[len(line) :]
    head, found, tail = text.partition(f"\n{line}")
    return (f"{head}\n", True, tail) if found else (text, False, "")


def with_block(text: str, block: str) -> tuple[str, list[str], list[str]]:
    """``text``, which has no block, with ``block`` at its end; the parameters that are extended, and those kept."""
    present = set(_ASSIGNMENT.findall("\n".join(_first_lines(text))))
    extended: list[str] = []
    kept: list[str] = []
    ours: list[str] = []
    for entry in _entries(block):
        assignment = _ASSIGNMENT.match(entry)
        name = assignment[1] if assignment else None
        extends = name is not None and f"${FORMER}{name}" in entry
        if name in present and not extends:
            kept.append(name)
            continue
        if name in present:
            extended.append(name)
        ours.append(_REFERENCE.sub(lambda found: found[0] if found[1] in present else "", entry))
    lines = text.splitlines(keepends=True)
    for number, line in enumerate(lines):
        found = _ASSIGNMENT.match(line)
        if found and found[1] in extended:
            lines[number] = FORMER + line
    head = "".join(lines)
    begin = BEGIN
    if head and not head.endswith("\n"):
        head, begin = f"{head}\n", BEGIN_NO_NEWLINE
    return f"{head}{begin}\n{''.join(ours)}{END}\n", extended, kept


def _first_lines(text: str) -> list[str]:
    """The lines that begin a logical line (postconf(5)): no comment, no continuation."""
    return [line for line in text.splitlines() if line[:1] not in {"#", " ", "\t", ""}]


def _entries(block: str) -> list[str]:
    """Logical lines, each with its continuations; comments and empty lines by themselves."""
    entries: list[str] = []
    for line in block.splitlines(keepends=True):
        if entries and line[:1] in {" ", "\t"} and line.strip():
            entries[-1] += line
        else:
            entries.append(line)
    return entries


def main() -> None:
    """Run as an Ansible module."""
    module = AnsibleModule(
        argument_spec={
            "path": {"type": "path", "default": "/etc/postfix/main.cf"},
            "block": {"type": "str", "default": ""},
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
        },
        supports_check_mode=True,
    )
    path = Path(module.params["path"])
    try:
        before = path.read_bytes().decode("utf-8", "surrogateescape")
        after = without_block(before)
    except (OSError, ValueError) as error:
        module.fail_json(msg=f"{path} was left as it is: {error}")
        return
    extended: list[str] = []
    kept: list[str] = []
    if module.params["state"] == "present":
        after, extended, kept = with_block(after, module.params["block"])
    if after != before and not module.check_mode:
        new = Path(module.tmpdir) / "main.cf"
        new.write_bytes(after.encode("utf-8", "surrogateescape"))
        module.atomic_move(str(new), str(path))
    diff = {"before": before, "after": after, "before_header": str(path), "after_header": str(path)}
    module.exit_json(changed=after != before, extended=extended, kept=kept, diff=diff)


if __name__ == "__main__":
    main()
