#!/usr/bin/env python3
"""Debian's package index as Redis commands, and back: for scripts/demo. Standard library only.

  debian-packages.py write FILE    writes one SET per package to FILE and prints packages and bytes
  debian-packages.py compare PORT  reads every package back from a node and compares it byte for byte
"""

import socket
import subprocess
import sys


def packages():
    index = subprocess.run(["apt-cache", "dumpavail"], check=True, stdout=subprocess.PIPE).stdout
    found = {}
    for stanza in index.split(b"\n\n"):
        fields = dict(line.split(b": ", 1) for line in stanza.split(b"\n") if b": " in line and line[:1] != b" ")
        if {b"Package", b"Version", b"Architecture"} <= fields.keys():
            found[b"%b=%b:%b" % (fields[b"Package"], fields[b"Version"], fields[b"Architecture"])] = stanza
    if len(found) < 1000:
        sys.exit("apt knows hardly any package here: run scripts/setup-test-tools (or apt-get update) first")
    return found


def command(*args):
    return b"*%d\r\n" % len(args) + b"".join(b"$%d\r\n%b\r\n" % (len(a), a) for a in args)


def write(path):
    found = packages()
    with open(path, "wb") as out:
        for key, stanza in found.items():
            out.write(command(b"SET", key, stanza))
    print(len(found), sum(map(len, found.values())))


def compare(port):
    found = packages()
    keys = list(found)
    with socket.create_connection(("127.0.0.1", port), timeout=60) as s, s.makefile("rb") as replies:
        for start in range(0, len(keys), 200):
            page = keys[start : start + 200]
            s.sendall(b"".join(command(b"GET", key) for key in page))
            for key in page:
                head = replies.readline()
                if head[:1] != b"$":
                    sys.exit(f"{key.decode()}: {head.decode(errors='replace').strip()}")
                size = int(head[1:])
                value = replies.read(size + 2)[:-2] if size >= 0 else None
                if value != found[key]:
                    sys.exit(f"{key.decode()} came back different")
            done = min(start + 200, len(keys))
            if sys.stdout.isatty() or done == len(keys):
                print(f"\r  {done} of {len(keys)} packages equal", end="", flush=True)
        s.sendall(command(b"DBSIZE"))
        count = int(replies.readline()[1:])
        if count != len(keys):
            sys.exit(f"\nDBSIZE says {count}")
    print()


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1] == "write":
        write(sys.argv[2])
    elif len(sys.argv) == 3 and sys.argv[1] == "compare":
        compare(int(sys.argv[2]))
    else:
        sys.exit(__doc__)
