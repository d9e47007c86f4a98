"""Everything about waveforms after and before speech: reading them, joining, mastering, marking them.

Each room is imported on its own, so that a part that needs torch is paid for only where it is used.
"""
