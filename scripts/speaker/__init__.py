"""What `scripts/speak.py` is made of.

reading.py  standard input, a line at a time
sources.py  a job's audio as it is spoken: on this machine, or by a deployed worker
sinks.py    where it goes: speakers, a file, standard output
"""
