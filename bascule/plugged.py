"""Whether Postfix, as it is configured now, still asks bascule.

``main.cf`` is the operator's: ``postconf -e``, a panel or an upgrade may write a
line anew and leave ours out. Then mail of a domain that moves would be refused, or
go astray; so it is looked at now and then, and by ``bascule check``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from bascule.child import output_of

#: The parameters that must name ours, and what of ours. config_templates/postfix/main.cf.j2 says what each is.
WOVEN: Mapping[str, str] = {
    "transport_maps": "bascule_transport_maps",
    "relay_domains": "bascule_relay_domains",
    "virtual_alias_maps": "bascule_virtual_alias_maps",
    "smtpd_sender_login_maps": "bascule_smtpd_sender_login_maps",
    "smtpd_recipient_restrictions": "bascule_smtpd_recipient_restrictions",
    "smtpd_milters": "bascule_smtpd_milters",
}
#: The services that master.cf must have.
SERVICES = (
    "bascule", "bascule-lmtp", "bascule-lmtp-tls", "bascule-hold", "bascule-relay-encrypt", "bascule-relay-verify",
)  # fmt: skip
TIMEOUT = 15.0  # seconds for postconf


async def missing(config_directory: Path) -> list[str]:
    """What of ours Postfix does not have any more: parameters of main.cf, ``service/unix`` of master.cf.

    Raises:
        ChildFailed: postconf cannot be asked.
    """
    parameters = await _postconf(config_directory, "-x", *WOVEN, *WOVEN.values())
    services = await _postconf(config_directory, "-M")
    return missing_of(parameters, services)


async def value_of(config_directory: Path, parameter: str) -> str:
    """The value of a parameter, expanded.

    Raises:
        ChildFailed: postconf cannot be asked.
    """
    return (await _postconf(config_directory, "-x", "-h", parameter)).strip()


def missing_of(parameters: str, services: str) -> list[str]:
    """:func:`missing`, from what ``postconf -x`` says of WOVEN's names and values, and ``postconf -M``."""
    values = {
        name.strip(): " ".join(value.split())
        for name, _, value in (line.partition("=") for line in parameters.splitlines())
    }
    lost = [
        parameter
        for parameter, ours in WOVEN.items()
        if not values.get(ours) or values[ours] not in values.get(parameter, "")
    ]
    there = {line.split()[0] for line in services.splitlines() if re.match(r"\S+\s+unix\s", line)}
    return lost + [f"{service}/unix" for service in SERVICES if service not in there]


async def _postconf(config_directory: Path, *arguments: str) -> str:
    environment = os.environ | {"MAIL_CONFIG": str(config_directory)}
    # What it does not know it says on standard error, and ends well.
    output = await output_of("postconf", *arguments, timeout=TIMEOUT, environment=environment)
    return output.decode(errors="replace")
