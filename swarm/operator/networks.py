"""Where anonymous users come from, as far as the books need it: hashed networks, no addresses."""

from __future__ import annotations

import ipaddress
from hashlib import sha256

NARROW = {4: 24, 6: 48}
WIDE = {4: 16, 6: 32}


def networks_of(address: str, salt: bytes) -> tuple[str, str]:
    """Pseudonyms of the network around an address, and of the wider one around that."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return "network:unknown", "network:unknown-wide"
    if isinstance(parsed, ipaddress.IPv6Address) and parsed.ipv4_mapped:
        parsed = parsed.ipv4_mapped

    def pseudonym(prefix: int) -> str:
        network = ipaddress.ip_network((parsed, prefix), strict=False)
        return f"network:{sha256(salt + str(network).encode()).hexdigest()[:32]}"

    return pseudonym(NARROW[parsed.version]), pseudonym(WIDE[parsed.version])
