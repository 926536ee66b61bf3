"""What peers say: messages, frames, records, identities and the rules of a session. Pure."""
