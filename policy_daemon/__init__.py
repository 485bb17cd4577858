"""Postfix's questions, answered from memory: one asyncio process on every MX.

``routes`` decides; ``socketmap`` and ``policy`` speak Postfix's protocols;
``queue`` acts on Postfix's queue when a mailbox changes state; ``service``
puts them together.
"""
