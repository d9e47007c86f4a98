"""Keeps a RunPod serverless endpoint as a file says: `python scripts/deploy.py --help`.

Over RunPod's REST API v2 (https://docs.runpod.io/api-reference-v2); v1 is retired on 2026-12-01. An endpoint of v2
holds its container's settings itself, so there is no template to look after.

    files.py      the TOML file, read and checked       hiding.py    secrets, and keeping them out of what is printed
    endpoint.py   what a file and an answer say, as the same fields, and how they differ
    api.py        requests, with retries that repeat no creation whose answer was lost
    answers.py    what is answered about an endpoint, checked
    applying.py   find, create, update, delete
"""
