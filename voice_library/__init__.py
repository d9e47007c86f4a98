"""Named voices, kept between jobs: prompt audio, metadata and cached conditionals.

On a folder or in a bucket, so that all workers of a fleet share them. Knows nothing of the engine:
what it stores beside the audio are bytes and names.
"""
