"""The text of a configuration file, from the templates and settings that bascule itself uses."""

from __future__ import annotations

DOCUMENTATION = """
name: configuration
author: The bascule developers
version_added: "0.2.0"
short_description: Renders one of bascule's own configuration templates
description:
  - Renders a file of C(config_templates/) exactly as bascule and its tests do, with bascule's settings as variables.
  - bascule must be installed for the Python that runs Ansible.
options:
  _terms:
    description: Names of templates, as C(postfix/main.cf.j2).
    required: true
  settings:
    description: What differs from bascule's defaults, table by table, as in C(bascule.toml).
    type: dict
    required: true
  also:
    description: Whatever the template wants besides.
    type: dict
    default: {}
"""

EXAMPLES = """
- name: Settings of all parts on this host
  ansible.builtin.copy:
    content: "{{ lookup('bascule.mail.configuration', 'bascule.toml.j2', settings=base__settings) }}"
    dest: /etc/bascule/bascule.toml
    mode: "0644"
"""

RETURN = """
_list:
  description: The text of each template.
  type: list
  elements: str
"""

from typing import Any

from ansible.errors import AnsibleError

from ansible.plugins.lookup import LookupBase

try:
    from jinja2 import UndefinedError
    from psycopg.conninfo import conninfo_to_dict
    from pydantic import ValidationError

    from bascule.config_templates import render
    from bascule.settings import Settings
except ImportError as error:
    MISSING: ImportError | None = error
else:
    MISSING = None


def _plain(value: Any) -> Any:
    """Ansible's containers, which template their content when it is looked at, as ordinary ones."""
    if isinstance(value, dict):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value


class LookupModule(LookupBase):
    """``lookup('bascule.mail.configuration', template, settings=...)``."""

    def run(self, terms: list[str], variables: dict[str, Any] | None = None, **kwargs: Any) -> list[str]:
        """The rendered templates.

        Raises:
            AnsibleError: a setting is wrong, or one is missing that the template wants.
        """
        if MISSING is not None:
            raise AnsibleError(
                f"bascule is not installed for the Python that runs Ansible ({MISSING}). "
                "Install it there: pip install '.[ansible]' in bascule's checkout."
            )
        self.set_options(var_options=variables, direct=kwargs)
        try:
            settings = Settings.model_validate(_plain(self.get_option("settings")))
        except ValidationError as error:
            wrong = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
            raise AnsibleError(f"these settings of bascule are wrong: {wrong}") from error
        database = {name: value for name, value in conninfo_to_dict(settings.database).items() if value is not None}
        values = settings.model_dump() | {"database_parameters": database} | _plain(self.get_option("also"))
        try:
            return [render(term, **values) for term in terms]
        except UndefinedError as error:
            raise AnsibleError(f"{terms}: {error}") from error
