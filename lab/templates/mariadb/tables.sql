CREATE DATABASE mailserver;
CREATE USER 'mailserver'@'127.0.0.1' IDENTIFIED BY 'of-the-lab';
GRANT SELECT ON mailserver.* TO 'mailserver'@'127.0.0.1';
USE mailserver;
CREATE TABLE domains (id INT PRIMARY KEY AUTO_INCREMENT, name VARCHAR(50) NOT NULL);
CREATE TABLE users (
    id INT PRIMARY KEY AUTO_INCREMENT, domain INT NOT NULL, address VARCHAR(100) NOT NULL UNIQUE,
    password VARCHAR(150) NOT NULL, quota BIGINT NOT NULL DEFAULT 0, FOREIGN KEY (domain) REFERENCES domains(id)
);
CREATE TABLE aliases (
    id INT PRIMARY KEY AUTO_INCREMENT, domain INT NOT NULL, source VARCHAR(100) NOT NULL,
    destination VARCHAR(100) NOT NULL, FOREIGN KEY (domain) REFERENCES domains(id)
);
INSERT INTO domains (name) VALUES ('shop.test');
INSERT INTO aliases (domain, source, destination) VALUES (1, 'sales@shop.test', 'anna@shop.test');
