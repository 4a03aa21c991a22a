"""Tether: ordinary machines that serve language models together, peer to peer."""

__version__ = "0.1.0"
