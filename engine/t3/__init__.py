"""T3, text to speech tokens: both backbones over a static KV cache, and rows that join and leave it.

A row is one chunk of text being spoken. All rows of all requests take each step together, which is
where the speed comes from; nothing of a request is kept on the modules, which hold weights alone.
"""
