"""bascule moves a mail domain to Postfix and Dovecot, one user at a time, while nobody notices."""

__version__ = "0.1.0"
