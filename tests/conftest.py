"""Tests in three floors: ``unit`` (no server), ``database`` (a PostgreSQL of its own), ``lab`` (all real servers)."""
