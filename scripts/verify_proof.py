"""Checks a proof of work of a swarm, offline. Needs Python and the package cryptography, no more.

    python verify_proof.py PROOF --log-key NAME+ID+KEY --witness NAME+ID+KEY --needed 1
    python verify_proof.py PROOF

The proof comes from whoever wants to be believed (``swarm ledger prove``); the keys of the log and
of its witnesses come from elsewhere: from the operator's and the witnesses' own pages. Prints what
is proven as JSON. Exit code 0: everything in the file holds; 1: something does not.

What it means: a *leaf* was in the operator's public log when the witnesses cosigned, so nobody can
take it back unseen. A *voucher* says that the holder of an allowance's key vouched for the work and
that the node answered for it, and both name the policy that they kept; without an operator anybody
can make allowances, so count whom you know among the issuers.
"""

import argparse
import base64
import hashlib
import json
import re
import sys
from collections.abc import Sequence
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

HEADER = "sovereign-swarm ledger proof v1"
TYPE = "application/vnd.sovereign-swarm.%s.v1+json"
MAX_FILE_BYTES = 1 << 28
MAX_INTEGER = (1 << 53) - 1
FIELD_PRIME = 2**255 - 19
SMALL_ORDER_Y = {
    0,
    1,
    FIELD_PRIME - 1,
    0x05FC536D880238B13933C6D305ACDFD5F098EFF289F4C345B027B2C28F95E826,
    0x7A03AC9277FDC74EC6CC392CFA53202A0F67100D760B3CBA4FD84D3D706A17C7,
}
RECEIVED = "received"  # the subject of a user's own file
BASE58 = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
PEER_ID_PREFIX = bytes.fromhex("002408011220")
WORK = ("prefill_tokens", "decode_tokens", "backward_tokens", "moved_bytes")
SHARED = ("serial", "node", "session", "sequence", "model", "first_block", "end_block", "adapter")

Key = tuple[str, int, bytes, bytes]
Keys = tuple[Key | None, Sequence[Key], int]


class Refused(Exception):
    """Something in the file does not hold."""


def need(holds: object, reason: str) -> None:
    if not holds:
        raise Refused(reason)


def decode_base64(text: Any) -> bytes:
    """Strictly: one text for each byte string."""
    try:
        data = base64.b64decode(text, validate=True)
    except (ValueError, TypeError) as error:
        raise Refused("no base64") from error
    need(base64.b64encode(data).decode() == text, "base64 that is not canonical")
    return data


def check_signature(key: bytes, message: bytes, signature: bytes) -> None:
    """Ed25519; keys that make signatures meaningless are refused."""
    need(len(key) == 32 and len(signature) == 64, "sizes of a signature")
    y = int.from_bytes(key, "little") & (2**255 - 1)
    need(y < FIELD_PRIME and y not in SMALL_ORDER_Y, "a key that must not be used")
    try:
        Ed25519PublicKey.from_public_bytes(key).verify(signature, message)
    except (InvalidSignature, ValueError) as error:
        raise Refused("a signature is wrong") from error


def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    need(len(content) == len(pairs), "a name occurs twice")
    return content


def no_float(text: str) -> Any:
    raise Refused(f"a number that is no integer: {text[:20]}")


def parse_json(data: bytes | str) -> Any:
    try:
        text = data if isinstance(data, str) else data.decode("ascii")
        return json.loads(
            text,
            object_pairs_hook=no_duplicates,
            parse_float=no_float,
            parse_constant=no_float,
        )
    except (ValueError, RecursionError) as error:
        raise Refused("no strict JSON") from error


# --- vouchers ------------------------------------------------------------------------------------
def public_key_of(peer_id: str) -> bytes:
    """The Ed25519 key in a libp2p peer id."""
    number = 0
    for character in peer_id:
        need(character in BASE58, "no peer id")
        number = number * 58 + BASE58.index(character)
    raw = number.to_bytes((number.bit_length() + 7) // 8, "big")
    raw = bytes(len(peer_id) - len(peer_id.lstrip("1"))) + raw
    need(raw.startswith(PEER_ID_PREFIX) and len(raw) == 38, "no Ed25519 peer id")
    return raw[6:]


def opened(envelope: dict[str, Any], kind: str) -> tuple[dict[str, Any], bytes]:
    """The object in a DSSE envelope with one signature, and who signed."""
    need(set(envelope) == {"payload", "payloadType", "signatures"}, "fields of an envelope")
    need(envelope["payloadType"] == TYPE % kind, f"this is no {kind}")
    need(len(envelope["signatures"]) == 1, "one signature is needed")
    signature = envelope["signatures"][0]
    need(set(signature) == {"keyid", "sig"}, "fields of a signature")
    need(re.fullmatch("[0-9a-f]{64}", signature["keyid"]), "a key id")
    payload, name = decode_base64(envelope["payload"]), envelope["payloadType"].encode()
    signer = bytes.fromhex(signature["keyid"])
    signed = b"DSSEv1 %d %b %d %b" % (len(name), name, len(payload), payload)
    check_signature(signer, signed, decode_base64(signature["sig"]))
    content = parse_json(payload)
    need(isinstance(content, dict) and len(payload) <= 4096, "no object")
    for value in content.values():
        is_count = type(value) is int and 0 <= value <= MAX_INTEGER
        need(is_count or (type(value) is str and value.isascii()), "a value of a wrong type")
    return content, signer


def check_voucher(item: dict[str, Any], subject: str, sums: dict[str, Any]) -> None:
    need(item.keys() - {"policy"} == {"allowance", "voucher", "receipt"}, "fields of an item")
    allowance, issuer = opened(item["allowance"], "allowance")
    voucher, holder = opened(item["voucher"], "voucher")
    receipt, node = opened(item["receipt"], "receipt")
    need(holder.hex() == allowance["voucher_key"], "a voucher by somebody else")
    need(voucher["serial"] == allowance["serial"], "a voucher of another allowance")
    need(subject in (voucher["node"], RECEIVED), "a voucher for somebody else")
    need(node == public_key_of(voucher["node"]), "a receipt by somebody else")
    for name in SHARED + WORK:
        need(voucher[name] == receipt[name], f"voucher and receipt differ in {name}")
    policy, text = voucher.get("policy", ""), item.get("policy")
    need(policy == receipt.get("policy", ""), "voucher and receipt differ in policy")
    if text is not None:
        need(hashlib.sha256(text.encode()).hexdigest() == policy, "another policy is named")
        need(isinstance(parse_json(text), dict), "no policy")
    channel = (voucher["serial"], voucher["session"])
    need(channel not in sums["channels"], "a channel occurs twice")
    sums["channels"].add(channel)
    for name in WORK:
        sums[name] = sums.get(name, 0) + voucher[name]
    sums["vouchers"] = sums.get("vouchers", 0) + 1
    kept = text or (f"SHA-256 {policy}" if policy else "none")
    for name, value in (("issuers", issuer.hex()), ("nodes", voucher["node"]), ("policies", kept)):
        sums[name][value] = sums[name].get(value, 0) + 1


# --- leaves of the public log --------------------------------------------------------------------
def parse_key(text: str) -> Key:
    """Name, kind, id and key of ``NAME+ID+KEY`` as signed notes have them."""
    name, separator, rest = text.partition("+")
    key_id, second, material = rest.partition("+")
    need(separator and second and re.fullmatch("[0-9a-f]{8}", key_id), "no verifier key")
    raw = decode_base64(material)
    need(len(raw) == 33 and raw[0] in (1, 4), "no Ed25519 verifier key")
    expected = hashlib.sha256(name.encode() + b"\n" + raw).digest()[:4]
    need(expected.hex() == key_id, "a verifier key whose id does not fit")
    return name, raw[0], expected, raw[1:]


def check_note(note: str, key: Key) -> str | None:
    """The body of a signed note if ``key`` signed it; None if there is no signature by it."""
    body, separator, signatures = note.partition("\n\n")
    need(separator and signatures.endswith("\n"), "no signed note")
    body += "\n"
    name, kind, key_id, public_key = key
    for line in signatures[:-1].split("\n"):
        need(line.startswith("\u2014 "), "a line that is no signature")
        signer, _, blob = line[2:].partition(" ")
        raw = decode_base64(blob)
        if signer != name or raw[:4] != key_id:
            continue
        message, signature = body.encode(), raw[4:]
        if kind == 4:  # a witness, with the time at which it looked
            need(len(signature) == 72, "size of a cosignature")
            time_unix_s = int.from_bytes(signature[:8], "big")
            message = b"cosignature/v1\ntime %d\n" % time_unix_s + message
            signature = signature[8:]
        check_signature(public_key, message, signature)
        return body
    return None


def node_hash(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\x01" + left + right).digest()


def root_of(index: int, size: int, leaf: bytes, hashes: list[bytes]) -> bytes:
    """RFC 9162, 2.1.3.2."""
    need(0 <= index < size, "a leaf beyond the log")
    position, last, digest = index, size - 1, hashlib.sha256(b"\x00" + leaf).digest()
    for sibling in hashes:
        need(last > 0, "a proof that is too long")
        if position % 2 or position == last:
            digest = node_hash(sibling, digest)
            while position % 2 == 0 and position:
                position, last = position >> 1, last >> 1
        else:
            digest = node_hash(digest, sibling)
        position, last = position >> 1, last >> 1
    need(last == 0, "a proof that is too short")
    return digest


def check_leaf(item: dict[str, Any], subject: str, keys: Keys, sums: dict[str, Any]) -> None:
    need(set(item) == {"leaf", "proof"}, "fields of an item")
    log, witnesses, needed = keys
    if log is None:
        raise Refused("this file needs --log-key")
    leaf = decode_base64(item["leaf"])
    head, separator, note = item["proof"].partition("\n\n")
    lines = head.split("\n")
    need(separator and lines[0] == "c2sp.org/tlog-proof@v1" and len(lines) >= 2, "no proof")
    need(re.fullmatch("index (0|[1-9][0-9]{0,15})", lines[1]), "a proof without an index")
    body = check_note(note, log)
    if body is None:
        raise Refused("the log has not signed")
    origin, size, root = body.split("\n")[:3]
    need(origin == log[0] and re.fullmatch("0|[1-9][0-9]{0,15}", size), "no checkpoint of the log")
    index, hashes = int(lines[1][6:]), [decode_base64(line) for line in lines[2:]]
    need(all(len(digest) == 32 for digest in hashes), "size of a hash")
    need(root_of(index, int(size), leaf, hashes) == decode_base64(root), "not in the log")
    cosigned = sum(check_note(note, witness) is not None for witness in witnesses)
    need(cosigned >= needed, f"{cosigned} of {needed} witnesses cosigned")
    need(index not in sums["leaves"], "a leaf occurs twice")
    sums["leaves"].add(index)
    event = parse_json(leaf)
    need(sum(amount for _, amount in event["postings"]) == 0, "an event that does not sum to zero")
    for account, amount in event["postings"]:
        if account.partition(":")[2] == subject or account == subject:
            key = f"{event['kind']} {account}"
            sums["posted"][key] = sums["posted"].get(key, 0) + amount


# --- the file ------------------------------------------------------------------------------------
def check_file(
    data: bytes, log: Key | None = None, witnesses: Sequence[Key] = (), needed: int = 0
) -> dict[str, Any]:
    """What the bytes of a file prove, as a dictionary. Raises Refused."""
    need(len(data) <= MAX_FILE_BYTES and data.isascii() and data.endswith(b"\n"), "no proof file")
    body, _, last = data[:-1].rpartition(b"\n")
    body += b"\n"
    need(last == b"sha256 " + hashlib.sha256(body).hexdigest().encode(), "the file was changed")
    lines = body.decode("ascii").split("\n")[:-1]
    need(len(lines) >= 2 and lines[0] == HEADER, "no proof of version 1")
    head: dict[str, Any] = parse_json(lines[1])
    need(set(head) == {"subject"}, "the file names no subject")
    sums: dict[str, Any] = {"channels": set(), "leaves": set()}
    sums |= {name: {} for name in ("issuers", "nodes", "policies", "posted")}
    for line in lines[2:]:
        item = parse_json(line)
        try:
            if "leaf" in item:
                check_leaf(item, head["subject"], (log, witnesses, needed), sums)
            else:
                check_voucher(item, head["subject"], sums)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise Refused("an item without the right fields") from error
    leaves = sums.pop("leaves")
    del sums["channels"]
    return {"subject": head["subject"], "leaves": len(leaves), **sums}


def main() -> int:
    parser = argparse.ArgumentParser(description="Checks a proof of work of a swarm, offline.")
    parser.add_argument("file")
    parser.add_argument("--log-key", metavar="NAME+ID+KEY")
    parser.add_argument("--witness", action="append", default=[], metavar="NAME+ID+KEY")
    parser.add_argument("--needed", type=int, default=0, help="witnesses that must have cosigned")
    arguments = parser.parse_args()
    try:
        log = parse_key(arguments.log_key) if arguments.log_key else None
        witnesses = [parse_key(text) for text in arguments.witness]
        with open(arguments.file, "rb") as file:
            proven = check_file(file.read(MAX_FILE_BYTES + 1), log, witnesses, arguments.needed)
    except Refused as refused:
        print(f"refused: {refused}", file=sys.stderr)
        return 1
    print(json.dumps(proven, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
