"""Drives a node with redis-py, as an application would: test_client.py PORT PROTOCOL."""

import sys
import threading
import time

import redis

PORT, PROTOCOL = int(sys.argv[1]), int(sys.argv[2])
checks = 0


def check(found, wanted, what):
    global checks
    checks += 1
    if found != wanted:
        sys.exit(f"protocol {PROTOCOL}: {what}: wanted {wanted!r}, found {found!r}")


def raises(error, text, call, what):
    try:
        call()
    except error as e:
        check(text in str(e), True, f"{what}: {e}")
    else:
        sys.exit(f"{what}: no {error.__name__}")


def strings(r):
    check(r.ping(), True, "ping")
    check(r.set("s", "héllo"), True, "set")
    check(r.get("s"), "héllo".encode(), "get")
    check(r.get("none"), None, "get of nothing")
    binary = bytes(range(256)) * 5000
    check(r.set(b"bin\r\n\x00key", binary), True, "binary key and value")
    check(r.get(b"bin\r\n\x00key"), binary, "binary value back")
    check(r.set("s", "x", nx=True), None, "set nx on a key that is there")
    check(r.set("s", "new", get=True), "héllo".encode(), "set get")
    check(r.set("none", "x", xx=True), None, "set xx on nothing")
    check(r.append("s", "er"), 5, "append")
    check(r.strlen("s"), 5, "strlen")
    check(r.getrange("s", 1, -2), b"ewe", "getrange")
    check(r.setrange("s", 6, "!"), 7, "setrange")
    check(r.get("s"), b"newer\x00!", "the gap is zeros")
    check(r.incr("n", 5), 5, "incrby")
    check(r.decr("n"), 4, "decr")
    check(r.incrbyfloat("f", 0.25), 0.25, "incrbyfloat")
    raises(redis.ResponseError, "not an integer", lambda: r.incr("s"), "incr of text")
    check(r.mset({f"m{i}": i for i in range(100)}), True, "mset")
    check(r.mget([f"m{i}" for i in range(101)]), [b"%d" % i for i in range(100)] + [None], "mget")
    check(r.msetnx({"m1": 1, "fresh": 1}), False, "msetnx with one key there")
    check(r.exists("fresh"), 0, "msetnx did nothing")
    check(r.msetnx({"fresh1": 1, "fresh2": 2}), True, "msetnx")
    check(r.exists("m1", "m2", "m1", "none"), 3, "exists counts repeats")
    check(r.delete("m1", "m2", "none"), 2, "delete")
    check(r.unlink("m3"), 1, "unlink")
    check(r.getdel("m4"), b"4", "getdel")
    check(r.type("s"), b"string", "type")


def expiries(r):
    r.set("e", "v", px=150)
    check(0 < r.pttl("e") <= 150, True, "pttl")
    check(r.ttl("s"), -1, "ttl of a key without expiry")
    check(r.ttl("none"), -2, "ttl of nothing")
    deadline = time.monotonic() + 30
    while r.get("e") is not None and time.monotonic() < deadline:
        time.sleep(0.02)
    check(r.get("e"), None, "an expired key is gone")
    check(r.exists("e"), 0, "and does not exist")
    r.set("e", "v", ex=1000)
    check(r.persist("e"), True, "persist")
    check(r.ttl("e"), -1, "persisted")
    check(r.expire("e", 100), True, "expire")
    check(r.expire("e", 50, gt=True), False, "expire gt")
    check(r.expire("e", 500, gt=True), True, "expire gt later")
    at = int(time.time()) + 1000
    check(r.expireat("e", at), True, "expireat")
    check(r.expiretime("e"), at, "expiretime")
    check(r.set("e", "w", keepttl=True), True, "set keepttl")
    check(r.expiretime("e"), at, "kept")
    check(r.getex("e", persist=True), b"w", "getex")
    check(r.ttl("e"), -1, "getex persist")
    check(r.pexpire("e", -1), True, "an expiry in the past")
    check(r.exists("e"), 0, "deletes")


def pipelines(r):
    with r.pipeline(transaction=False) as p:
        for i in range(5000):
            p.set(f"p{i}", "v" * (i % 100))
            p.strlen(f"p{i}")
        results = p.execute()
    check(results, [x for i in range(5000) for x in (True, i % 100)], "replies in order")
    with r.pipeline() as p:
        p.incr("t").incr("t").get("t").set("t2", "x")
        check(p.execute(), [1, 2, b"2", True], "transaction")
    with r.pipeline() as p:
        p.set("t3", "text").incr("t3").set("t4", "x")
        found = p.execute(raise_on_error=False)
    check([found[0], found[2]], [True, True], "one failing command does not undo the others")
    check(isinstance(found[1], redis.ResponseError), True, "its error is in its place")
    check(r.get("t4"), b"x", "the command after it ran")


def watch(r):
    other = connect()
    r.set("w", 1)
    with r.pipeline() as p:
        p.watch("w")
        other.set("w", 2)
        p.multi()
        p.set("w", 3)
        raises(redis.WatchError, "", p.execute, "a watched key changed")
    check(r.get("w"), b"2", "nothing was done")
    with r.pipeline() as p:
        p.watch("w", "never")
        value = int(p.get("w"))
        p.multi()
        p.set("w", value + 1)
        check(p.execute(), [True], "nothing changed in between")
    check(r.get("w"), b"3", "done")

    def add():
        mine = connect()
        for _ in range(25):
            mine.transaction(lambda p: (n := int(p.get("sum") or 0), p.multi(), p.set("sum", n + 1)), "sum")

    threads = [threading.Thread(target=add) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    check(r.get("sum"), b"100", "optimistic increments from four connections")


def scans(r):
    r.flushall()
    r.mset({f"scan:{i}": i for i in range(3000)})
    r.mset({f"other:{i}": i for i in range(500)})
    found = list(r.scan_iter(match="scan:*", count=50))
    check(sorted(set(found)), sorted(b"scan:%d" % i for i in range(3000)), "scan_iter with a pattern")
    check(len(set(r.scan_iter())), 3500, "scan_iter over everything")
    check(r.dbsize(), 3500, "dbsize")
    check(len(r.keys("other:?")), 10, "keys with a pattern")
    check(r.flushdb(), True, "flushdb")
    check(r.dbsize(), 0, "empty")


def server(r):
    check("redis_version" in r.info(), True, "info")
    check(r.echo("x"), b"x", "echo")
    check(abs(r.time()[0] - time.time()) < 600, True, "time")
    raises(redis.ResponseError, "unknown command", lambda: r.execute_command("NOSUCH", "x"), "unknown command")
    hello = r.execute_command("HELLO", PROTOCOL)
    if isinstance(hello, list):
        hello = dict(zip(hello[::2], hello[1::2]))
    check(hello[b"proto"], PROTOCOL, "the protocol that was asked for")


def connect():
    return redis.Redis(host="127.0.0.1", port=PORT, protocol=PROTOCOL, socket_timeout=60)


if __name__ == "__main__":
    client = connect()
    for part in (strings, expiries, pipelines, watch, scans, server):
        part(client)
    print(f"{checks} checks passed with redis-py {redis.__version__}, protocol {PROTOCOL}")
