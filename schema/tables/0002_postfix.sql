-- How mail to the legacy server is secured.

ALTER TABLE domain
    ADD COLUMN smtp_tls text NOT NULL DEFAULT 'may' CHECK (smtp_tls IN ('may', 'encrypt', 'verify'));
COMMENT ON COLUMN domain.smtp_tls IS
    'TLS of mail to the legacy server. may: as Postfix does it for other hosts; encrypt: always; '
    'verify: always, with a certificate that is good for smtp_host';
