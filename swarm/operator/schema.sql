-- The operator's books. One writer; amounts are integers in units.
CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS account (
    name TEXT PRIMARY KEY,
    balance INTEGER NOT NULL CHECK (balance >= 0 OR name = 'mint')
) WITHOUT ROWID;
-- idx is the index of the leaf in the log
CREATE TABLE IF NOT EXISTS event (
    idx INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, leaf BLOB NOT NULL, hash BLOB NOT NULL
);
CREATE TABLE IF NOT EXISTS entry (
    account TEXT NOT NULL, idx INTEGER NOT NULL, unix_s INTEGER NOT NULL, amount INTEGER NOT NULL,
    PRIMARY KEY (account, idx)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS model (
    model TEXT PRIMARY KEY, blocks INTEGER NOT NULL, mflop INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS organisation (
    organisation TEXT PRIMARY KEY, key BLOB NOT NULL, may_validate INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS member (
    account TEXT NOT NULL, budget TEXT NOT NULL, daily_units INTEGER NOT NULL,
    organisation TEXT NOT NULL, PRIMARY KEY (account, budget)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS adapter (adapter TEXT PRIMARY KEY, terms BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS used_order (id TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS node (
    node TEXT PRIMARY KEY, payout TEXT NOT NULL, organisation TEXT NOT NULL,
    sequence INTEGER NOT NULL, registered_unix_s INTEGER NOT NULL,
    clean_audits INTEGER NOT NULL DEFAULT 0, state TEXT NOT NULL DEFAULT 'active',
    certified_until_unix_s INTEGER NOT NULL DEFAULT 0,
    -- what it served last: so many millionths of this model
    model TEXT NOT NULL DEFAULT '', span_millionths INTEGER NOT NULL DEFAULT 0,
    settled_unix_s INTEGER NOT NULL DEFAULT 0, earned_units INTEGER NOT NULL DEFAULT 0
) WITHOUT ROWID;
-- payer is what is suspended and capped: an account, or the hashed network of an anonymous user
CREATE TABLE IF NOT EXISTS allowance (
    serial TEXT PRIMARY KEY, request TEXT NOT NULL UNIQUE, envelope TEXT NOT NULL,
    class TEXT NOT NULL, source TEXT NOT NULL, payer TEXT NOT NULL, organisation TEXT NOT NULL,
    voucher_key BLOB NOT NULL, maximum INTEGER NOT NULL, per_node INTEGER NOT NULL,
    price_epoch INTEGER NOT NULL, route_seed BLOB NOT NULL, issued_unix_s INTEGER NOT NULL,
    not_before_unix_s INTEGER NOT NULL, expires_unix_s INTEGER NOT NULL,
    used INTEGER NOT NULL DEFAULT 0 CHECK (used BETWEEN 0 AND maximum),
    is_open INTEGER NOT NULL DEFAULT 1
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS open_allowance ON allowance (expires_unix_s) WHERE is_open;
CREATE INDEX IF NOT EXISTS allowance_payer ON allowance (payer, issued_unix_s);
CREATE TABLE IF NOT EXISTS suspension (payer TEXT PRIMARY KEY, reason TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS bucket (
    network TEXT PRIMARY KEY, units INTEGER NOT NULL, unix_s INTEGER NOT NULL
) WITHOUT ROWID;
-- value is the price of the best voucher, paid what was paid for it so far
CREATE TABLE IF NOT EXISTS channel (
    serial TEXT NOT NULL, node TEXT NOT NULL, session TEXT NOT NULL,
    sequence INTEGER NOT NULL, value INTEGER NOT NULL, paid INTEGER NOT NULL,
    voucher TEXT NOT NULL,
    PRIMARY KEY (serial, node, session)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS pair (
    node TEXT NOT NULL, payer TEXT NOT NULL, day INTEGER NOT NULL, units INTEGER NOT NULL,
    PRIMARY KEY (node, payer, day)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS lot (
    node TEXT NOT NULL, settled_unix_s INTEGER NOT NULL, idx INTEGER NOT NULL, source TEXT NOT NULL,
    units INTEGER NOT NULL CHECK (units > 0),
    PRIMARY KEY (node, settled_unix_s, idx, source)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS verdict (
    segment TEXT NOT NULL, signer BLOB NOT NULL, node TEXT NOT NULL, outcome TEXT NOT NULL,
    PRIMARY KEY (segment, signer)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS probe (
    node TEXT NOT NULL, organisation TEXT NOT NULL, hour INTEGER NOT NULL, blocks INTEGER NOT NULL,
    PRIMARY KEY (node, organisation, hour)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS verdict_node ON verdict (node, outcome);
CREATE TABLE IF NOT EXISTS evidence (
    kind TEXT NOT NULL, serial TEXT NOT NULL, node TEXT NOT NULL, session TEXT NOT NULL,
    first TEXT NOT NULL, second TEXT NOT NULL, unix_s INTEGER NOT NULL,
    PRIMARY KEY (serial, node, session, kind)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS checkpoint (
    size INTEGER PRIMARY KEY, note TEXT NOT NULL, unix_s INTEGER NOT NULL, cosigned_unix_s INTEGER
);
