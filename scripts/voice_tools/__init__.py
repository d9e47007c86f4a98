"""What the commands of scripts/voices.py are made of.

opening.py finds the library that a person means; adding.py brings recordings in; copying.py brings voices
out to files and from one library to another; showing.py prints. The commands themselves are in scripts/voices.py.
"""
