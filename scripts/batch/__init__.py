"""Many texts through an endpoint, each done once whatever happens on the way: `python scripts/submit_batch.py --help`.

What a batch has done is in a manifest in its output folder, so any run may be killed at any moment and the next one
goes on. What may have been taken without an answer is sent again under the same `idempotency_key`.

    errors.py     what ends a batch
    rows.py       a file's rows before they are checked: CSV, JSONL, texts, books
    epub.py       a book's chapters                        books.py      cut into parts that one job each can speak
    checking.py   rows → jobs, or what is wrong with them  voices.py     are the voices that rows name there?
    names.py      file names from keys                     recordings.py voices of rows, looked at and put in
    manifest.py   what is done, on disk                    files.py      audio files that are whole or not there
    rates.py      no more requests than the platform takes
    client.py     the platform's HTTP, with patience       outcomes.py   what a job's end means
    runner.py     jobs in flight                           joining.py    parts → one book
    costs.py      characters → seconds → dollars           report.py     results.jsonl and the summary
    board.py      progress for people, events for programs interrupts.py Ctrl-C, and what becomes of jobs
    local.py      workers on this machine
"""
