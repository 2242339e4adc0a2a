"""
How large, deep and slow a merchant's file may be: every limit of reading and importing. Constants only.

A file over a limit is refused with a line that names the limit. The limits of a child process (memory, time) are the
last line of defence: what the named limits let through cannot take the server down either.
"""

from __future__ import annotations

MiB = 2**20

# --- any file ---------------------------------------------------------------------------------------------------------
MAX_FILE_BYTES = 64 * MiB
MAX_ROWS = 10**6
MAX_COLUMNS = 1_000
MAX_CELL_CHARS = 100_000
MAX_CELLS = 10**7  # of one file
MAX_TEXT_CHARS = 40 * 10**6  # bytes of text a child may hand over: one long cell can be repeated in every row
MAX_LINE_CHARS = 4 * MiB  # of one line of CSV: a longer one is a million columns or a quote that was never closed
MAX_ROW_SEPARATORS = 20_000  # counted before a row is split: a list of 64 million cells would take half a gigabyte

# --- formats that unpack or nest --------------------------------------------------------------------------------------
MAX_UNPACKED_BYTES = 128 * MiB  # XLSX and DOCX, all parts together; 100,000 rows of questions and answers are about 40
MAX_PART_BYTES = {"xlsx": 64 * MiB, "docx": 6 * MiB}  # one XML part; DOCX parts become a tree in memory
MAX_RATIO = 200  # unpacked : packed, of a part over a mebibyte; sheets reach 60, a bomb 1,000
MAX_PARTS = 10_000
MAX_JSON_BYTES = 16 * MiB  # as one document; JSONL is read line by line and may be as large as any file
MAX_JSON_LINE_CHARS = MiB
MAX_JSON_NODES = 10**6  # lists and objects: a gigabyte of them fits in 15 MiB
MAX_JSON_DEPTH = 8
MAX_HTML_BYTES = 8 * MiB
MAX_HTML_DEPTH = 200
MAX_PAGES = 1_000
MAX_DOCUMENT_CHARS = 4 * 10**6
MAX_SPAN = 100  # colspan, rowspan

# --- the child process that reads a foreign format --------------------------------------------------------------------
CHILD_MEMORY_BYTES = 80 * MiB  # above what the child has when its library is loaded …
CHILD_MEMORY_PER_BYTE = 2.0  # … and for each byte unpacked, once the named limits were kept
CHILD_CPU_S = 3.0  # processor time, so that a busy machine refuses nothing …
CHILD_CPU_S_PER_MIB = 1.0  # … and for each mebibyte, packed, and unpacked once the named limits were kept
CHILD_WALL_FACTOR = 10.0  # times the processor time: a child that waits instead of working is ended
