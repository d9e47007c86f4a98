"""S3Gen, speech tokens to waveform: the flow makes mel frames, the vocoder turns them into samples.

Upstream's weights behind a driver of our own: noise is drawn per request, batches are masked where
padding would leak, and what can be folded is folded once, at load.
"""
