"""The certificate as an in-toto statement, the form that sigstore's and in-toto's tools sign and check.

https://github.com/in-toto/attestation/blob/main/spec/v1/statement.md
"""

from __future__ import annotations

import json

from specdef_cli.certify.certificate import FORMAT_VERSION, Certificate

STATEMENT_NAME = "certificate.intoto.json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = f"urn:specdef:certificate:{FORMAT_VERSION}"


def in_toto_statement(certificate: Certificate) -> str:
    """JSON text: the hardened files are the subject, the certificate is what is said of them."""
    subject = [{"name": name, "digest": {"sha256": digest}} for name, digest in certificate.provenance.hardened.items()]
    statement = {
        "_type": STATEMENT_TYPE,
        "subject": subject,
        "predicateType": PREDICATE_TYPE,
        "predicate": json.loads(certificate.to_json()),
    }
    return json.dumps(statement, indent=1, ensure_ascii=False) + "\n"
