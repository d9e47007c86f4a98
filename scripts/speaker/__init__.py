"""What `scripts/speak.py` is made of.

reading.py     standard input, a line at a time
sources.py     a job's audio as it is spoken: on this machine, or by a deployed worker
sinks.py       where it goes: speakers, a file, standard output, a pipe
unattended.py  what may wait for ever, in threads that nobody waits for
interrupts.py  Ctrl-C, SIGTERM and a terminal that is closed
"""
