"""Asking: sessions that remember a film, an engine for many people at once, the server and its page.

Importing it costs nothing. From Python start with `session.py`; `hico serve` starts with `command.py`.
"""
