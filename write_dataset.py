"""Encodes a split into .beton files: python write_dataset.py --split train [--source FOLDER] [--out FOLDER]

--plan measures and proposes which files to write. --help lists the options. If the command is interrupted or
killed, start it again: it continues.
"""

from vitlocal.launch import write

if __name__ == "__main__":
    write()
