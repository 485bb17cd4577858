#!/usr/bin/python
"""Whether Dovecot would read a file, were it there."""

from __future__ import annotations

DOCUMENTATION = """
module: dovecot_includes
author: The bascule developers
version_added: "0.2.0"
short_description: Says whether a file is among those that dovecot.conf includes
description:
  - Follows C(!include) and C(!include_try), whose patterns are relative to the file that they are in.
  - The file itself need not be there. Nothing is changed.
options:
  file:
    description: The file, by its absolute path.
    type: path
    required: true
  path:
    description: Dovecot's configuration.
    type: path
    default: /etc/dovecot/dovecot.conf
attributes:
  check_mode:
    support: full
    description: Looks only.
"""

EXAMPLES = """
- name: Is conf.d read?
  bascule.mail.dovecot_includes:
    file: /etc/dovecot/conf.d/99-bascule.conf
"""

RETURN = """
included:
  description: Whether it is.
  returned: success
  type: bool
"""

import glob
import os
import re
from pathlib import Path, PurePosixPath

from ansible.module_utils.basic import AnsibleModule

# Dovecot's documentation, "Including config files".
_INCLUDE = re.compile(r'^\s*!include(?:_try)?\s+"?([^"#\n]+?)"?\s*(?:#.*)?$', re.MULTILINE)


def includes(path: Path, file: PurePosixPath, seen: frozenset[str] = frozenset()) -> bool:
    """Whether ``path``, or what it includes, includes ``file``.

    Raises:
        OSError: a file that is included cannot be read.
    """
    for named in _INCLUDE.findall(path.read_text(encoding="utf-8", errors="replace")):
        pattern = os.path.normpath(path.parent / named)
        if file.match(pattern):
            return True
        for other in sorted(glob.glob(pattern)):  # noqa: PTH207 (the pattern may be absolute)
            if other not in seen and Path(other).is_file() and includes(Path(other), file, seen | {other}):
                return True
    return False


def main() -> None:
    """Run as an Ansible module."""
    module = AnsibleModule(
        argument_spec={
            "file": {"type": "path", "required": True},
            "path": {"type": "path", "default": "/etc/dovecot/dovecot.conf"},
        },
        supports_check_mode=True,
    )
    try:
        included = includes(Path(module.params["path"]), PurePosixPath(module.params["file"]))
    except OSError as error:
        module.fail_json(msg=f"Dovecot's configuration cannot be read: {error}")
        return
    module.exit_json(changed=False, included=included)


if __name__ == "__main__":
    main()
