"""Dovecot's logins for users who have not moved.

The logic is in the resident ``authenticator``; what Dovecot starts for each
login, the script ``bascule-checkpassword``, is a thin client of it.
"""
