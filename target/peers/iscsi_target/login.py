# SPDX-License-Identifier: Apache-2.0
"""The login phase of a target (RFC 7143 sections 6 and 13): stages, CHAP, negotiation of keys."""

from __future__ import annotations

import hashlib
import hmac
import os
from dataclasses import dataclass, field

from target.peers.iscsi_target import pdu
from target.peers.iscsi_target.pdu import Opcode, Pdu, PduError

SECURITY, OPERATIONAL, FULL_FEATURE = 0, 1, 3
TRANSIT, CONTINUE = 0x80, 0x40
# Status class and detail: section 11.13.5.
SUCCESS, INITIATOR_ERROR, AUTHENTICATION_FAILURE = 0x0000, 0x0200, 0x0201
NOT_FOUND, MISSING_PARAMETER, TARGET_ERROR = 0x0203, 0x0207, 0x0300
CHAP_HASHES = {"5": "md5", "6": "sha1", "7": "sha256", "8": "sha3_256"}


class LoginFailed(Exception):
    """The initiator gets this status, and then the connection ends."""

    def __init__(self, status: int) -> None:
        super().__init__(f"login status {status:#06x}")
        self.status = status


@dataclass(frozen=True)
class Account:
    """Who may log in, and with ``mutual_*`` how the target proves itself."""

    user: str
    password: str
    mutual_user: str = ""
    mutual_password: str = ""


@dataclass
class Parameters:
    """What was negotiated, with the values that hold without (section 13). Lengths in bytes."""

    header_digest: bool = False
    data_digest: bool = False
    initial_r2t: bool = True
    immediate_data: bool = True
    max_receive: int = 8192  # of the initiator
    max_burst: int = 262144
    first_burst: int = 65536


@dataclass
class Limits:
    """What this target wants of an initiator."""

    header_digest: tuple[str, ...] = ("None", "CRC32C")
    data_digest: tuple[str, ...] = ("None", "CRC32C")
    initial_r2t: bool = False
    immediate_data: bool = True
    max_burst: int = 262144
    first_burst: int = 65536
    max_receive: int = 262144
    max_outstanding_r2t: int = 1


@dataclass
class Login:
    """The state of one connection's login; ``answer`` takes each request to its response."""

    targets: dict[str, Account | None]
    limits: Limits
    parameters: Parameters = field(default_factory=Parameters)
    keys: dict[str, str] = field(default_factory=dict)
    done: bool = False
    authenticated: bool = False
    _text: bytes = b""
    _challenge: bytes = b""
    _hash: str = ""
    _told: bool = False

    @property
    def discovery(self) -> bool:
        return self.keys.get("SessionType") == "Discovery"

    @property
    def initiator(self) -> str:
        return self.keys.get("InitiatorName", "")

    @property
    def target(self) -> str:
        return self.keys.get("TargetName", "")

    def answer(self, request: Pdu) -> tuple[int, bytes]:
        """Flags and text of the response. LoginFailed with the status that refuses."""
        self._text += request.data
        if request.flags & CONTINUE:
            return request.flags & 0x0C, b""
        offered = pdu.decode_text(self._text)
        self._text = b""
        self.keys |= offered
        self._check_names()
        stage, after = request.flags >> 2 & 3, request.flags & 3
        reply = {} if self._told else {"TargetPortalGroupTag": "1"}
        self._told = True
        if stage == SECURITY:
            ready = self._security(offered, reply)
        elif stage == OPERATIONAL:
            if not self._authenticate_not_needed():
                raise LoginFailed(AUTHENTICATION_FAILURE)
            self._negotiate(offered, reply)
            ready = True
        else:
            raise LoginFailed(INITIATOR_ERROR)
        flags = stage << 2
        if request.flags & TRANSIT and ready:
            if after not in (OPERATIONAL, FULL_FEATURE) or after <= stage:
                raise LoginFailed(INITIATOR_ERROR)
            flags |= TRANSIT | after
            self.done = after == FULL_FEATURE
        return flags, pdu.encode_text(reply)

    def _check_names(self) -> None:
        if not self.initiator:
            raise LoginFailed(MISSING_PARAMETER)
        if not self.discovery and self.target not in self.targets:
            raise LoginFailed(NOT_FOUND if self.target else MISSING_PARAMETER)

    @property
    def _account(self) -> Account | None:
        return None if self.discovery else self.targets[self.target]

    def _authenticate_not_needed(self) -> bool:
        return self.authenticated or self._account is None

    # ---- security ----

    def _security(self, offered: dict[str, str], reply: dict[str, str]) -> bool:
        """Whether the stage may end."""
        if "AuthMethod" in offered:
            methods = offered["AuthMethod"].split(",")
            wanted = "None" if self._account is None else "CHAP"
            if wanted not in methods:
                raise LoginFailed(AUTHENTICATION_FAILURE)
            reply["AuthMethod"] = wanted
            return wanted == "None"
        if "CHAP_A" in offered:
            self._offer_challenge(offered["CHAP_A"].split(","), reply)
            return False
        if "CHAP_R" in offered:
            self._check_response(offered, reply)
            return True
        return self._authenticate_not_needed()

    def _offer_challenge(self, algorithms: list[str], reply: dict[str, str]) -> None:
        known = [name for name in algorithms if name in CHAP_HASHES]
        if not known:
            raise LoginFailed(AUTHENTICATION_FAILURE)
        self._hash = known[0]
        self._challenge = os.urandom(16)
        reply |= {"CHAP_A": known[0], "CHAP_I": "7", "CHAP_C": f"0x{self._challenge.hex()}"}

    def _check_response(self, offered: dict[str, str], reply: dict[str, str]) -> None:
        account = self._account
        if account is None or not self._challenge:
            raise LoginFailed(AUTHENTICATION_FAILURE)
        expected = self._response(7, account.password, self._challenge)
        given = _binary(offered["CHAP_R"])
        if offered.get("CHAP_N") != account.user or not hmac.compare_digest(expected, given):
            raise LoginFailed(AUTHENTICATION_FAILURE)
        self.authenticated = True
        if "CHAP_C" in offered:
            if not account.mutual_user:
                raise LoginFailed(AUTHENTICATION_FAILURE)
            identifier = int(offered.get("CHAP_I", "0"), 0) & 0xFF
            proof = self._response(identifier, account.mutual_password, _binary(offered["CHAP_C"]))
            reply |= {"CHAP_N": account.mutual_user, "CHAP_R": f"0x{proof.hex()}"}

    def _response(self, identifier: int, password: str, challenge: bytes) -> bytes:
        """RFC 1994 section 4.1."""
        digest = hashlib.new(CHAP_HASHES[self._hash])
        digest.update(bytes((identifier,)) + password.encode() + challenge)
        return digest.digest()

    # ---- operational parameters ----

    def _negotiate(self, offered: dict[str, str], reply: dict[str, str]) -> None:
        limits, agreed = self.limits, self.parameters
        for key, value in offered.items():
            answer = self._answer_key(key, value)
            if answer is not None:
                reply[key] = answer
        agreed.header_digest = reply.get("HeaderDigest") == "CRC32C"
        agreed.data_digest = reply.get("DataDigest") == "CRC32C"
        agreed.initial_r2t = reply.get("InitialR2T", "Yes") == "Yes"
        agreed.immediate_data = reply.get("ImmediateData", "Yes") == "Yes"
        agreed.max_burst = int(reply.get("MaxBurstLength", agreed.max_burst))
        agreed.first_burst = int(reply.get("FirstBurstLength", agreed.first_burst))
        agreed.max_receive = int(offered.get("MaxRecvDataSegmentLength", agreed.max_receive))
        reply["MaxRecvDataSegmentLength"] = str(limits.max_receive)

    def _answer_key(self, key: str, value: str) -> str | None:
        limits = self.limits
        match key:
            case "HeaderDigest":
                return _first(value, limits.header_digest)
            case "DataDigest":
                return _first(value, limits.data_digest)
            case "InitialR2T":
                return _yes(value == "Yes" or limits.initial_r2t)
            case "ImmediateData":
                return _yes(value == "Yes" and limits.immediate_data)
            case "MaxBurstLength":
                return str(min(_number(value), limits.max_burst))
            case "FirstBurstLength":
                return str(min(_number(value), limits.first_burst))
            case "MaxOutstandingR2T":
                return str(min(_number(value), limits.max_outstanding_r2t))
            case "DefaultTime2Wait" | "DefaultTime2Retain" | "ErrorRecoveryLevel":
                return "0"
            case "MaxConnections":
                return "1"
            case "DataPDUInOrder" | "DataSequenceInOrder":
                return "Yes"
            case "IFMarker" | "OFMarker":
                return "No"
            case "InitiatorName" | "InitiatorAlias" | "TargetName" | "SessionType" | "AuthMethod":
                return None
            case "MaxRecvDataSegmentLength":
                return None  # declared by each side for itself
        return "NotUnderstood"


def response(request: Pdu, flags: int, text: bytes, tsih: int, stat_sn: int, status: int) -> Pdu:
    """A Login Response; the caller adds the sequence numbers of commands."""
    header = bytearray(pdu.make(Opcode.LOGIN_RESPONSE, flags=flags, itt=request.itt, data=text).header)
    header[8:14] = request.header[8:14]  # ISID
    header[14:16] = tsih.to_bytes(2, "big")
    header[24:28] = stat_sn.to_bytes(4, "big")
    header[28:32] = header[32:36] = request.cmd_sn.to_bytes(4, "big")
    header[36:38] = status.to_bytes(2, "big")
    return Pdu(bytes(header), text)


def _first(offered: str, taken: tuple[str, ...]) -> str:
    for value in offered.split(","):
        if value in taken:
            return value
    return "Reject"


def _yes(value: bool) -> str:
    return "Yes" if value else "No"


def _number(text: str) -> int:
    if not text.isdecimal():
        raise PduError(f"a key whose value is no number: {text[:20]!r}")
    return int(text)


def _binary(text: str) -> bytes:
    """A large binary value: hexadecimal is what initiators send."""
    digits = text[2:] if text[:2].lower() == "0x" else ""
    if not digits or len(digits) > 2048:
        raise LoginFailed(INITIATOR_ERROR)
    try:
        return bytes.fromhex(digits.zfill(len(digits) + len(digits) % 2))
    except ValueError:
        raise LoginFailed(INITIATOR_ERROR) from None
