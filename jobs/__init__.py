"""What a job is: its schema, one module per operation, fetching what it names, delivering what it made.

This room stands between the platform (JSON in, JSON out) and the engine (text in, waveform out). It
knows the engine's public names and maps its errors to the job API's codes; nothing in the engine knows
of it. A new operation is a model in `jobs.schema`, a module beside `jobs.tts`, and a row in
`jobs.worker.OPERATIONS`.
"""
