"""What must stand in our schema of a PostgreSQL database of revision `SCHEMA_REVISION`, by the digest of its definition.

A table, column, constraint, index, trigger or function that is missing, different, disabled or foreign differs from this list; so
does a policy, a rule, an inheriting table, or a foreign key whose triggers are off. A unit test makes the list anew from the
migrations and prints it where it differs.
"""

from collections.abc import Iterable, Mapping
from hashlib import sha256

from sidecar.store.postgresql.rights import SCHEMA
from sidecar.store.statements import Row

__all__ = ["OBJECTS", "SCHEMA_OBJECTS", "fingerprints"]

_KINDS = (
    "WHEN 'v' THEN 'view' WHEN 'm' THEN 'view' WHEN 'S' THEN 'sequence' WHEN 'f' THEN 'foreign table' ELSE 'relation'"
)

# One row for each object: kind, name, definition. To be run with our search_path: names are deparsed as they are seen from it.
OBJECTS = f"""
WITH relation AS (SELECT * FROM pg_catalog.pg_class WHERE relnamespace = '{SCHEMA}'::regnamespace),
  counted AS (SELECT * FROM relation WHERE relname <> 'alembic_version')
SELECT 'table', relname::text, concat_ws(E'\\n', relpersistence, relrowsecurity, relforcerowsecurity, relispartition,
    (SELECT count(*) FROM pg_catalog.pg_inherits WHERE relation.oid IN (inhrelid, inhparent)),
    (SELECT string_agg(concat_ws(' ', attname, format_type(atttypid, atttypmod), collname, attnotnull, attidentity, attgenerated,
        pg_get_expr(adbin, adrelid)), E'\\n' ORDER BY attnum)
      FROM pg_catalog.pg_attribute LEFT JOIN pg_catalog.pg_collation c ON c.oid = attcollation
        LEFT JOIN pg_catalog.pg_attrdef ON adrelid = attrelid AND adnum = attnum
      WHERE attrelid = relation.oid AND attnum > 0 AND NOT attisdropped))
  FROM counted AS relation WHERE relkind = 'r'
UNION ALL SELECT CASE relkind {_KINDS} END, relname::text, relkind::text
  FROM relation WHERE relkind NOT IN ('r', 'i')
UNION ALL SELECT 'constraint', relname || '.' || conname, concat_ws(E'\\n', pg_get_constraintdef(c.oid), convalidated,
    condeferrable, (SELECT string_agg(tgenabled::text, '' ORDER BY tgenabled) FROM pg_catalog.pg_trigger WHERE tgconstraint = c.oid))
  FROM pg_catalog.pg_constraint c JOIN counted ON conrelid = counted.oid WHERE contype <> 'n'
UNION ALL SELECT 'index', relname::text, concat_ws(E'\\n', pg_get_indexdef(indexrelid), indisvalid, indisready, indislive,
    indimmediate)
  FROM pg_catalog.pg_index JOIN relation ON relation.oid = indexrelid WHERE relname <> 'alembic_version_pkc'
UNION ALL SELECT 'trigger', relname || '.' || tgname, concat_ws(E'\\n', pg_get_triggerdef(t.oid), tgenabled)
  FROM pg_catalog.pg_trigger t JOIN relation ON relation.oid = tgrelid WHERE NOT tgisinternal
UNION ALL SELECT 'rule', relname || '.' || rulename, pg_get_ruledef(r.oid)
  FROM pg_catalog.pg_rewrite r JOIN relation ON relation.oid = ev_class
UNION ALL SELECT 'policy', relname || '.' || polname, polcmd::text
  FROM pg_catalog.pg_policy JOIN relation ON relation.oid = polrelid
UNION ALL SELECT 'function', proname::text, CASE WHEN prokind IN ('f', 'p') THEN pg_get_functiondef(oid) ELSE prokind::text END
  FROM pg_catalog.pg_proc WHERE pronamespace = '{SCHEMA}'::regnamespace
UNION ALL SELECT 'operator', oprname::text, oprcode::text
  FROM pg_catalog.pg_operator WHERE oprnamespace = '{SCHEMA}'::regnamespace
UNION ALL SELECT 'type', typname::text, typtype::text
  FROM pg_catalog.pg_type WHERE typnamespace = '{SCHEMA}'::regnamespace AND typrelid = 0 AND typelem = 0
"""  # noqa: S608, E501 - of constants


def fingerprints(rows: Iterable[Row]) -> dict[str, str]:
    """Of each object: the first 16 hex digits of SHA-256 over its definition. Overloaded names are one object."""
    definitions: dict[str, list[str]] = {}
    for kind, name, definition in rows:
        definitions.setdefault(f"{kind} {name}", []).append(definition)
    return {
        name: sha256("\n".join(sorted(texts)).encode()).hexdigest()[:16] for name, texts in sorted(definitions.items())
    }


SCHEMA_OBJECTS: Mapping[str, str] = {
    "constraint claims.claims_pkey": "d8a847f45e83693c",
    "constraint consents.consents_check": "49ad33a9246d4ef7",
    "constraint consents.consents_pkey": "aec63ccc9ea2432a",
    "constraint consents.consents_state_check": "a12a2fb6b13f2bd6",
    "constraint consents.consents_version_check": "108c77387074f5d5",
    "constraint instances.instances_origin_key": "a4a251c7d6667e8c",
    "constraint instances.instances_pkey": "aec63ccc9ea2432a",
    "constraint limit_reservations.limit_reservations_minor_units_check": "62aab49d6cbe7128",
    "constraint limit_reservations.limit_reservations_payment_fkey": "dd936208eca9d73f",
    "constraint limit_reservations.limit_reservations_pkey": "4e3b8cd5708231f1",
    "constraint limit_reservations.limit_reservations_released_check": "b1803fdafb45b04f",
    "constraint limit_reservations.limit_reservations_scope_period_type_alignment_start_time__fkey": "c572008f75b33d74",
    "constraint limit_windows.limit_windows_alignment_check": "c72d4426e4b854bc",
    "constraint limit_windows.limit_windows_currency_check": "04dd17d5d3f0b2c8",
    "constraint limit_windows.limit_windows_period_type_check": "1ffb71ace583b2bc",
    "constraint limit_windows.limit_windows_pkey": "917d7ff1adc0a85f",
    "constraint limit_windows.limit_windows_reserved_check": "b64aea60e2526699",
    "constraint limit_windows.limit_windows_scope_check": "04d03841c452ff14",
    "constraint log_checkpoints.log_checkpoints_origin_fkey": "a69d4c37d0b704a1",
    "constraint log_checkpoints.log_checkpoints_pkey": "1956db3af1159262",
    "constraint log_checkpoints.log_checkpoints_size_check": "759d0b5919dfc5e8",
    "constraint log_heads.log_heads_check": "af4a96c13e5bd954",
    "constraint log_heads.log_heads_commits_check": "dd6d5518351691c9",
    "constraint log_heads.log_heads_origin_fkey": "a69d4c37d0b704a1",
    "constraint log_heads.log_heads_pkey": "88c83159ea98f4fa",
    "constraint log_heads.log_heads_size_check": "b514df37bdd6b983",
    "constraint log_leaves.log_leaves_entry_check": "29d90b561ad12f67",
    "constraint log_leaves.log_leaves_index_check": "28480d3ee0bb9dba",
    "constraint log_leaves.log_leaves_origin_fkey": "a69d4c37d0b704a1",
    "constraint log_leaves.log_leaves_pkey": "d7f12278b2dd95d0",
    "constraint master_keys.master_keys_current_check": "ef8469f31d6f663a",
    "constraint master_keys.master_keys_key_id_key": "714078f0e811054f",
    "constraint master_keys.master_keys_pkey": "daf40edc4f709fee",
    "constraint master_keys.master_keys_version_check": "108c77387074f5d5",
    "constraint master_keys.master_keys_wrapped_check": "0e82e3aaba847864",
    "constraint payments.payments_amount_currency_check": "008e08a75e984071",
    "constraint payments.payments_amount_minor_units_check": "da3c972ebac0cde8",
    "constraint payments.payments_attempts_check": "2f61119626a1f25a",
    "constraint payments.payments_bank_key_check": "f1b9833602e7042e",
    "constraint payments.payments_bank_key_key": "4cc925e920d0ef3c",
    "constraint payments.payments_caller_request_id_fkey": "d8b3f429857c24b6",
    "constraint payments.payments_caller_request_id_key": "813af951cc0537a8",
    "constraint payments.payments_check": "cb647b3e9a8b5a64",
    "constraint payments.payments_check1": "29ca9b6bdcfe0f26",
    "constraint payments.payments_check2": "f4fd8bdd98b731df",
    "constraint payments.payments_consent_fkey": "0300b7be8edb1acb",
    "constraint payments.payments_dispatch_boot_time_ns_check": "9434a757847b61ff",
    "constraint payments.payments_epoch_check": "8fccbc50bff2f40d",
    "constraint payments.payments_idempotency_class_check": "fb5b4f648b555aa6",
    "constraint payments.payments_pkey": "aec63ccc9ea2432a",
    "constraint payments.payments_product_check": "75c4940a9a4e4b01",
    "constraint payments.payments_resolution_administrator_check": "f6c18ef37aee7a01",
    "constraint payments.payments_resolution_finding_check": "dc09361bc53327b5",
    "constraint payments.payments_resolution_reason_check": "4af688a0e41c3371",
    "constraint payments.payments_state_check": "9b9f16ff3f06d73f",
    "constraint refresh_leases.refresh_leases_consent_fkey": "0300b7be8edb1acb",
    "constraint refresh_leases.refresh_leases_epoch_check": "8fccbc50bff2f40d",
    "constraint refresh_leases.refresh_leases_pkey": "d31fc484ec1deb3a",
    "constraint relocations.relocations_commits_check": "dd6d5518351691c9",
    "constraint relocations.relocations_number_check": "333596e91138027d",
    "constraint relocations.relocations_pkey": "f32dad28043c67aa",
    "constraint relocations.relocations_step_check": "2e06416eb12915dc",
    "constraint secrets.secrets_consent_fkey": "0300b7be8edb1acb",
    "constraint secrets.secrets_kind_check": "e7bfa4845a8c9021",
    "constraint secrets.secrets_pkey": "80f0efa145479047",
    "constraint secrets.secrets_row_version_check": "fdb8cdbddbec981a",
    "constraint secrets.secrets_sealed_check": "c950b1da26a1ef8e",
    "function refuse": "9ddd82c026d053af",
    "index claims_pkey": "b3d1b95d9071bc68",
    "index consents_by_caller": "b770511be3e3b821",
    "index consents_by_expiry": "34b9f51ee12882d2",
    "index consents_by_owner": "5691ed3504ec4eb1",
    "index consents_by_refresh_time": "576e94f6b9d8f9ec",
    "index consents_by_token_expiry": "07f0586e75971579",
    "index consents_holding_key": "314081e27514a63a",
    "index consents_pkey": "3ed19da478cb00db",
    "index instances_origin_key": "32f29cb8462149ff",
    "index instances_pkey": "77411f57eb3669a9",
    "index limit_reservations_pkey": "07227454d0c7b203",
    "index limit_windows_pkey": "36c6722a7e7a974e",
    "index log_checkpoints_pkey": "85bf7c84ed8441c6",
    "index log_heads_pkey": "012e448967a7a695",
    "index log_leaves_pkey": "5b1c4a9c94876d44",
    "index master_keys_key_id_key": "a8aa751db75eee0d",
    "index master_keys_pkey": "b11acff8786879ec",
    "index one_current_master_key": "b35ec3bd061cbd47",
    "index payments_bank_key_key": "112faad4d539e55b",
    "index payments_by_caller": "365eb916ee116fc0",
    "index payments_by_consent": "375472cbfd2e3b14",
    "index payments_by_owner": "717eab5713d67535",
    "index payments_by_state": "5ffe2447740a9724",
    "index payments_caller_request_id_key": "23820c273bc2dd86",
    "index payments_due_others": "e66f168c46c5a23a",
    "index payments_due_unknown": "ac01f2ce6e331410",
    "index payments_pkey": "a9bcfe5071bf418d",
    "index refresh_leases_pkey": "c18abe731741f9b3",
    "index refresh_leases_unresolved": "8376307d19f17445",
    "index relocations_pkey": "6ac7786a4333c087",
    "index secrets_pkey": "9363bfa0e0c3abab",
    "table claims": "ed5c800c9e456e13",
    "table consents": "945069b94cc47a8c",
    "table instances": "71b66079cfaee956",
    "table limit_reservations": "921ffc1e6d9b52fb",
    "table limit_windows": "ce537fb24077a0bb",
    "table log_checkpoints": "c410065469eae1af",
    "table log_heads": "f65fc210952ec5ba",
    "table log_leaves": "1aa1c349a36879ab",
    "table master_keys": "071055c0cfd1660b",
    "table payments": "2ac0d3b24762fc3f",
    "table refresh_leases": "3a79500ca57f17b1",
    "table relocations": "8300aec8ea67eb9a",
    "table secrets": "d2d809191a2ac426",
    "trigger claims.claims_fixed": "fba5d58822c5e46f",
    "trigger claims.claims_not_truncated": "546966a6be689124",
    "trigger claims.claims_stay": "d7eb77212e47f852",
    "trigger consents.consents_identity": "adbf5da38df63841",
    "trigger consents.consents_limits": "d9feac435cc3422e",
    "trigger consents.consents_not_truncated": "153a34998ce5c902",
    "trigger consents.consents_revoked": "d8c199cab9984b75",
    "trigger consents.consents_stay": "624ea53136db2afe",
    "trigger consents.consents_version": "71f0e3bfedccd284",
    "trigger instances.instances_fixed": "b4020c8562e5bd74",
    "trigger instances.instances_not_truncated": "9a53dac9a0262fef",
    "trigger instances.instances_stay": "99cb94df33c1b70b",
    "trigger limit_reservations.limit_reservations_fixed": "24aaddc27e3c7dd5",
    "trigger limit_reservations.limit_reservations_not_truncated": "2f14345d3e06c033",
    "trigger limit_reservations.limit_reservations_released": "e3ecd34c0a78b0d9",
    "trigger limit_reservations.limit_reservations_stay": "017a500446836544",
    "trigger limit_windows.limit_windows_fixed": "64ac3e646d0663e9",
    "trigger limit_windows.limit_windows_not_truncated": "2edaea2e2782b101",
    "trigger limit_windows.limit_windows_stay": "468cbc4acbe23d6e",
    "trigger log_checkpoints.log_checkpoints_fixed": "b3670f3217a0b717",
    "trigger log_checkpoints.log_checkpoints_not_truncated": "ed707bd6961751f8",
    "trigger log_checkpoints.log_checkpoints_stay": "c66dc2e5b9eb2d52",
    "trigger log_heads.log_heads_grow": "fda53f94c812a04e",
    "trigger log_heads.log_heads_not_truncated": "d4d801e932df5f05",
    "trigger log_heads.log_heads_stay": "1fcc257bd22f369b",
    "trigger log_leaves.log_leaves_fixed": "60ccfcb87e7b036a",
    "trigger log_leaves.log_leaves_not_truncated": "1fb9e8db26391af5",
    "trigger log_leaves.log_leaves_stay": "f9a1ccb800f157e0",
    "trigger payments.payments_epoch": "2aec2452c5dc9e5a",
    "trigger payments.payments_final": "f0a68bab94dae7c8",
    "trigger payments.payments_instruction": "2aff90055aed4404",
    "trigger payments.payments_not_truncated": "123162d41a4a04d9",
    "trigger payments.payments_resolution": "0330d0ee0eca101b",
    "trigger payments.payments_resolution_fixed": "8075d512c8876402",
    "trigger payments.payments_resolved": "d679f3b93a3c3d5d",
    "trigger payments.payments_stay": "a152e8085e4700ae",
    "trigger relocations.relocations_fixed": "32f9be45065e8490",
    "trigger relocations.relocations_not_truncated": "3144b0a8367432cc",
    "trigger relocations.relocations_stay": "fa13e20153ba704c",
}
