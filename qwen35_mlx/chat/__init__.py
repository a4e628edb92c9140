"""Conversations: turns, sessions on disk, repetition."""
