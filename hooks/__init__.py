"""Dovecot's logins for users who have not moved.

The logic is in the resident authenticator (``service``, ``authenticator``); what
Dovecot runs, the script ``bascule-checkpassword`` or ``passdb.lua``, is a thin
client of it (``protocol``).
"""
