"""Personal data in a text, found by patterns and checksums, and covered.

`find_personal_data` finds mail addresses, bank accounts, numbers of persons (United States, Spain,
China), payment cards, IP addresses, postal addresses and telephone numbers; `redact` replaces them by
their kind or by a pseudonym. The time grows with the length of the text, not faster.

Left out: names, dates of birth, everything that only the meaning tells, and most countries. How much is
found and missed is measured in the notebook; no such list is complete.

Explained and proven in deployment/06_privacy.ipynb; written from there by `make promote`.
"""

import hashlib
import hmac
import ipaddress
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import date

from shared.checks import check_choice, check_text, require


@dataclass(frozen=True, order=True)
class Finding:
    """A stretch of a text that may be personal data: `text[start:end]`, and of which kind."""

    start: int
    end: int
    kind: str


LATIN = "A-Za-z0-9À-ɏ_"  # what a word of an address is made of; a Chinese character ends one
_LABEL = f"[{LATIN}-]{{1,63}}"
_DOT = r" ?(?:\(dot\)|\[dot\]|\{dot\}) ?"
EMAIL = re.compile(
    rf"(?<![{LATIN}.+-])[{LATIN}.+%-]{{1,64}}@(?:{_LABEL}\.){{1,8}}[A-Za-zÀ-ɏ]{{2,24}}(?![{LATIN}]|\.[{LATIN}]|:[{LATIN}/])"
)
SPELLED_EMAIL = re.compile(
    rf"(?<![{LATIN}.+-])[{LATIN}.+%-]{{1,64}}"
    rf"(?: ?(?:\(at\)|\[at\]|\{{at\}}) ?{_LABEL}(?:(?:{_DOT}|\.| dot ){_LABEL}){{1,6}}"
    rf"| at {_LABEL}(?:(?:{_DOT}| dot ){_LABEL}){{1,6}})",
    re.IGNORECASE,
)


def find_emails(text: str) -> Iterator[tuple[int, int]]:
    """Yield the places of mail addresses, also of those written with "(at)" and "(dot)"."""
    for pattern in (EMAIL, SPELLED_EMAIL):
        yield from (match.span() for match in pattern.finditer(text))


def luhn(digits: str) -> bool:
    """Return whether a card number's last digit is the right one (Luhn, 1960; ISO/IEC 7812).

    Every second digit from the right, beginning with the last but one, is doubled; of a result above 9 the digits are
    added. The sum of all must end in 0.
    """
    values = [int(digit) for digit in reversed(digits)]
    doubled = [sum(divmod(2 * value, 10)) for value in values[1::2]]
    return (sum(values[::2]) + sum(doubled)) % 10 == 0


CARD = re.compile(
    rf"(?<![{LATIN}.-])(?:\d{{14,19}}|\d{{4}}([ ._-])\d{{4}}\1\d{{4}}\1\d{{4}}(?:\1\d{{1,3}})?"
    rf"|\d{{2,7}}([ ._-])\d{{2,7}}(?:\2\d{{1,7}}){{1,5}})(?![A-Za-z0-9]|[.-]\d)"
)
# How the numbers of the networks begin: Visa, Mastercard, American Express, Diners, Discover, JCB, UnionPay, Maestro.
ISSUER = re.compile(
    r"4|5[1-5]|222[1-9]|22[3-9]|2[3-6]|27[01]|2720|3[47]|30[0-5]|309|3[689]|6011|64[4-9]|65|35|62|50|5[6-8]|6[379]"
)


def find_cards(text: str) -> Iterator[tuple[int, int]]:
    """Yield the places of numbers that begin like a payment card's, are as long as one, and pass Luhn's test."""
    for match in CARD.finditer(text):
        digits = re.sub(r"\D", "", match.group())
        length = {"34": 15, "37": 15}.get(digits[:2])
        if (
            14 <= len(digits) <= 19
            and ISSUER.match(digits)
            and luhn(digits)
            and length in (None, len(digits))
        ):
            yield match.span()


# Length of an IBAN by country, from the registry of SWIFT; countries of one length stand together.
IBAN_LENGTHS = {
    country: length
    for length, countries in {
        15: "NO", 16: "BE", 18: "DK FI FO GL NL SD", 19: "MK SI", 20: "AT BA EE KZ LT LU MN XK", 21: "CH HR LI LV",
        22: "BG BH CR DE GB GE IE ME RS VA", 23: "AE GI IL IQ OM SO TL", 24: "AD CZ ES MD PK RO SA SE SK TN VG",
        25: "LY PT ST", 26: "IS TR", 27: "BI DJ FR GR IT MC MR SM", 28: "AL AZ BY CY DO GT HU LB NI PL SV",
        29: "BR EG PS QA UA", 30: "JO KW MU", 31: "MT SC", 32: "LC", 33: "RU",
    }.items()
    for country in countries.split()
}  # fmt: skip
IBAN = re.compile(rf"(?<![{LATIN}])[A-Za-z]{{2}}\d{{2}}(?:[ ._-]{{0,2}}[A-Za-z0-9]){{11,31}}")


def iban_remainder(iban: str) -> int:
    """Return the remainder of an IBAN by 97, which is 1 if it has no slip (ISO 13616, ISO 7064).

    The first four characters go to the end, letters become 10 to 35, and the whole is one number.
    """
    return int("".join(str(int(sign, 36)) for sign in iban[4:] + iban[:4])) % 97


def find_ibans(text: str) -> Iterator[tuple[int, int]]:
    """Yield the places of bank accounts: a known country, its length, and the right check digits."""
    for match in IBAN.finditer(text):
        places = [i for i in range(*match.span()) if text[i] not in " ._-"]
        length = IBAN_LENGTHS.get(match.group()[:2].upper(), 99)
        if length > len(places):
            continue
        # What follows an IBAN in a sentence looks like one more group: the country says where it ends.
        end = places[length - 1] + 1
        is_whole = end == len(text) or not re.match(f"[{LATIN}]", text[end])
        if is_whole and iban_remainder("".join(text[i] for i in places[:length])) == 1:
            yield match.start(), end


SSN = re.compile(r"(?<![\w.-])(\d{3})([ .-]?)(\d{2})\2(\d{4})(?![\w-])", re.ASCII)
SSN_WORDS = re.compile(r"(?:\bssn|social security|taxpayer|\bitin|\btax id)[^\d\n]{0,20}$", re.IGNORECASE)
DNI = re.compile(
    rf"(?<![{LATIN}.])(?:(\d{{2}}\.?\d{{3}}\.?\d{{3}})|([XYZxyz])-?(\d{{7}}))[ -]?([A-Za-z])(?![{LATIN}])"
)
DNI_LETTERS = "TRWAGMYFPDXBNJZSQVHLCKE"
RESIDENT_ID = re.compile(r"(?<![A-Za-z0-9])([1-8]\d{16}[\dXx])(?![A-Za-z0-9])")


def is_ssn(area: int, group: int, serial: int) -> bool:
    """Return whether the US may give such a number: as a social security number, or to a taxpayer without one."""
    if area >= 900:
        return 50 <= group <= 99 and group not in (66, 67, 68, 69, 89, 93)
    return 0 < area != 666 and group > 0 and serial > 0


def is_resident_id(number: str) -> bool:
    """Return whether 18 characters are a number of China: a date of birth, and the last sign right (GB 11643-1999)."""
    try:
        born = date(int(number[6:10]), int(number[10:12]), int(number[12:14]))
    except ValueError:
        return False
    total = sum(int(digit) * (2 ** (17 - place) % 11) for place, digit in enumerate(number[:17]))
    return born.year >= 1900 and "10X98765432"[total % 11] == number[17].upper()


def find_ids(text: str) -> Iterator[tuple[int, int]]:
    """Yield the places of numbers of persons: of the United States (SSN, ITIN), Spain (DNI, NIE) and China."""
    for match in SSN.finditer(text):
        area, separator, group, serial = match.groups()
        # Nine digits in a row are many things; a word must stand before them.
        named = separator or SSN_WORDS.search(text, max(0, match.start() - 40), match.start())
        if named and is_ssn(int(area), int(group), int(serial)):
            yield match.span()
    for match in DNI.finditer(text):
        plain, first, rest, letter = match.groups()
        number = plain.replace(".", "") if plain else f"{'XYZ'.index(first.upper())}{rest}"
        if DNI_LETTERS[int(number) % 23] == letter.upper():
            yield match.span()
    yield from (match.span() for match in RESIDENT_ID.finditer(text) if is_resident_id(match.group()))


_POINT = r"(?:\.|\[\.\]|\(\.\)|\[dot\])"
IPV4 = re.compile(rf"(?<![{LATIN}.])(?:\d{{1,3}}{_POINT}){{3}}\d{{1,3}}(?![{LATIN}]|\.\d|-[A-Za-z]|/\d)")
IPV6 = re.compile(
    rf"(?<![{LATIN}:.])[0-9A-Fa-f]{{0,4}}(?::[0-9A-Fa-f]{{0,4}}){{2,8}}(?:\.\d{{1,3}}){{0,3}}(?![{LATIN}]|/\d)"
)
VERSION = re.compile(r"(?:\bv|version|release|build|firmware|\boid)\W{0,3}$", re.IGNORECASE)


def find_ips(text: str) -> Iterator[tuple[int, int]]:
    """Yield the places of IP addresses that may be somebody's: no networks, no "this machine", no "all machines"."""
    for pattern in (IPV4, IPV6):
        for match in pattern.finditer(text):
            found = match.group()
            # A colon behind an address belongs to the sentence.
            if found.endswith(":") and not found.endswith("::"):
                found = found[:-1]
            try:
                address = ipaddress.ip_address(re.sub(_POINT, ".", found))
            except ValueError:
                continue
            is_general = address.is_loopback or address.is_unspecified or address.is_multicast
            is_version = VERSION.search(text, max(0, match.start() - 12), match.start())
            if any(map(str.isdigit, found)) and not is_general and not is_version:
                yield match.start(), match.start() + len(found)


_EXTENSION = r"(?i:,? ?(?:ext\.?|extension|poste|x) ?\d{1,5}(?!\d))?"
_END = r"(?!\d|[.,/:-]\d)"
PHONES = [
    re.compile(pattern + _EXTENSION)
    for pattern in (
        # +44 7700 900123: a country, then up to 15 digits in all.
        rf"(?<![{LATIN}+.,:])\+(?:[ ./()-]{{0,2}}\d){{7,15}}{_END}",
        # 212-555-0123: North America, where area and exchange begin with 2 to 9.
        rf"(?<![{LATIN}.,+-])(?:1[ .-])?\(?[2-9]\d\d\)?[ ./-]{{1,2}}[2-9]\d\d[ .-]\d{{4}}{_END}",
        # 020 7946 0123, (030) 23125-123, 01 99 00 12 34: a zero, the area, the number in groups.
        rf"(?<![\d.,+/-])(?<![A-Z\d]{{4}} )\(?0[1-9]\d{{0,3}}\)?[ ./-]\d{{2,8}}(?:[ .-]\d{{2,6}}){{0,4}}{_END}",
        # 0044 20 7946 0123: as it is dialled.
        rf"(?<![{LATIN}.,+-])(?<![A-Z\d]{{4}} )00[1-9]\d{{0,2}}[ ./-](?:[ ./()-]{{0,2}}\d){{7,12}}{_END}",
        # 07700900123: a British mobile in one piece.
        rf"(?<![{LATIN}.,+-])07\d{{9}}{_END}",
    )
]
CALLED = re.compile(
    r"(?:\b(?:tele)?phone|\btel|t[ée]l[ée]f(?:on|ono)|téléphone|mobile|móvil|portable|\bcell|\bcall|\bring|\bdial|\bfax|pager|whatsapp"
    r"|电话|手机)[^\d\n+(]{0,12}([+(]?\d(?:[ ./()-]{0,2}\d){6,14})" + _END,
    re.IGNORECASE,
)
# How many digits a number has at most, its country's code included.
LONGEST = {"+1": 11, "+33": 11, "+34": 11, "+44": 12, "+49": 13, "+61": 11, "+86": 13}
DATE = re.compile(r"\d\d([./-])\d\d\1(?:19|20)\d\d")


def find_phones(text: str) -> Iterator[tuple[int, int]]:
    """Yield the places of telephone numbers, with their extension, as they are written in several countries."""
    for pattern in PHONES:
        for match in pattern.finditer(text):
            number = re.sub(
                r"[^\d+]", "", re.sub(r"(?i)(?:ext|x|poste).*", "", match.group()).replace("(0)", "")
            )
            most = next((n for code, n in LONGEST.items() if number.startswith(code)), 16)
            if DATE.match(match.group()) or len(number.removeprefix("+")) < 9:
                continue
            if len(number.removeprefix("+")) <= most:
                yield match.span()
            else:  # digits of the next word: the number ends where its country says
                places = [i for i in range(*match.span()) if text[i].isdigit()]
                yield match.start(), places[most - 1 + ("(0)" in match.group())] + 1
    yield from (match.span(1) for match in CALLED.finditer(text))


_CAPITAL = r"(?:[A-ZÀ-Þ#][\w'’.#-]{0,30}|\d{1,5}[A-Za-z]?)"  # a word of a name, or a number
_SMALL = r"(?:of|the|upon|on|de|des|du|la|le|les|del|los|las|der|dem|den|am|an|im|zum|zur)"
_CITY = r"[A-ZÀ-Þ][\w'’-]{1,30}"
_LONG_CITY = (
    rf"(?:(?:Groß|Klein|Bad|Sankt|Neu|Alt|Saint|San|Santa|Las|Los|La|El|Le|Ober|Unter|Villa)[ -])?{_CITY}"
)
_POSTCODE = r"(?:[A-Z]{2},? \d{5}(?:-\d{4})?|[A-Z]{1,2}\d[A-Z\d]? \d[A-Z]{2})(?![A-Za-z0-9])"
_STREET = (
    r"(?:Street|St\.?|Road|Rd\.?|Avenue|Ave\.?|Lane|Ln\.?|Drive|Dr\.?|Court|Ct\.?|Boulevard|Blvd\.?|Way|Place|Square"
    r"|Terrace|Close|Crescent|Row|Wharf|Gardens|Grove|Parade|Mews)"
)
ADDRESSES = [
    re.compile(pattern)
    for pattern in (
        # 203 Old Saltworks Road, Pinder Hollow, VT 05999; 5 Mistletoe Wharf, Ketterby, LN14 7UE; PO Box 7, ...
        rf"(?<![\w.,#-])(?:(?:Flat|Apt\.?|Unit|Suite) \w{{1,5}}, )?(?:\d{{1,5}}[A-Za-z]?|P\.?O\.? Box \d{{1,6}})"
        rf"(?:,? (?:{_CAPITAL}|{_SMALL})){{1,11}}?,? {_POSTCODE}",
        # 12 Elm Street, without a town; between number and "Street" stands a name.
        rf"(?<![\w.,#-])\d{{1,5}}[A-Za-z]? (?:[A-Z][\w'’.-]{{0,30}} ){{1,3}}{_STREET}(?![\w'’])",
        # Lindenallee 8, 04999 Neustadt; Am Teich 29, Hinterhaus, 18999 Wiek
        rf"(?<![\w-])[A-ZÀ-Þ][\w.'’-]{{1,40}}(?: (?:{_SMALL} )?[A-ZÀ-Þ][\w.'’-]{{1,40}}){{0,3}} \d{{1,4}} ?[a-z]?"
        rf"(?:, [A-ZÀ-Þ0-9][\w.º ]{{0,20}}){{0,2}}, (?:D-)?\d{{5}} {_LONG_CITY}",
        # Lindenallee 8, without a town
        r"(?<![\w-])[A-ZÀ-Þ][\w-]{1,40}(?:stra(?:ß|ss)e|str\.|gasse|allee|platz|weg|ufer|damm) \d{1,4}[a-z]?(?!\w)",
        # 12 rue des Lilas, 75999 Paris
        rf"(?<![\w.,#-])\d{{1,4}}(?: bis| ter)?,? (?:rue|avenue|boulevard|place|chemin|allée|impasse|quai|route|cours)"
        rf"(?: {_SMALL}| [ldLD]['’])?(?: ?{_CAPITAL}| {_SMALL}){{1,6}}?,? \d{{5}} {_LONG_CITY}",
        # Calle Mayor, 5, 3.º B, 28999 Madrid
        rf"(?<![\w-])(?:Calle|C/|Avenida|Avda\.|Paseo|Plaza|Camino)(?: (?:{_CAPITAL}|{_SMALL})){{1,6}}"
        rf",? (?:n\.?º ?)?\d{{1,4}}(?:, [\w.º ]{{1,12}}){{0,2}}, \d{{5}} {_LONG_CITY}",
        # 幸福路88号3栋501室
        r"[\u4e00-\u9fff]{2,20}(?:路|街|道|巷|胡同)\d{1,5}号(?:\d{1,4}(?:栋|号楼|单元|楼|室)){0,3}",
    )
]


def find_addresses(text: str) -> Iterator[tuple[int, int]]:
    """Yield the places of postal addresses: house, street and, where they stand, place and postal code."""
    for pattern in ADDRESSES:
        yield from (match.span() for match in pattern.finditer(text))


# In this order: what has a checksum is sure, so that a telephone number is what is left.
FINDERS: dict[str, Callable[[str], Iterable[tuple[int, int]]]] = {
    "email": find_emails,
    "iban": find_ibans,
    "id": find_ids,
    "card": find_cards,
    "ip": find_ips,
    "address": find_addresses,
    "phone": find_phones,
}


# Signs that only look different, one for one, so that places stay: no-break spaces, dashes, wide digits.
_ALIKE = str.maketrans(
    "\u00a0\u2007\u2009\u202f\u2010\u2011\u2012\u2013\uff20" + "".join(map(chr, range(0xFF10, 0xFF1A))),
    "    ----@0123456789",
)


def find_personal_data(text: str, kinds: Iterable[str] | None = None) -> list[Finding]:
    """Return what looks like personal data in a text, in the order of the text; no two findings overlap.

    The time grows with the length of the text and not faster: every repetition in the patterns has a bound.

    Args:
        text: Any text.
        kinds: Some of `FINDERS`; None: all.

    Raises:
        TypeError: `text` is no str.
        ValueError: A kind is unknown.
    """
    check_text("text", text)
    wanted = list(FINDERS) if kinds is None else list(kinds)
    for kind in wanted:
        check_choice("kinds", kind, FINDERS)
    text, found = text.translate(_ALIKE), []
    for kind, find in FINDERS.items():
        if kind not in wanted:
            continue
        taken: list[Finding] = []
        for start, end in sorted(find(text), key=lambda span: (span[0], -span[1])):
            if not taken or start >= taken[-1].end:
                taken.append(Finding(start, end, kind))
        # What is found is covered, so that the next finder sees neither it nor its parts.
        parts, place = [], 0
        for finding in taken:
            parts += [text[place : finding.start], "\0" * (finding.end - finding.start)]
            place = finding.end
        text = "".join([*parts, text[place:]])
        found += taken
    return sorted(found)


def pseudonym(kind: str, value: str, key: bytes) -> str:
    """Return a short name that is always the same for the same value, and says nothing about it without the key.

    Spellings that differ in case only have the same name; of numbers those, too, that differ in spaces and marks.
    (HMAC with SHA-256, RFC 2104; 40 bits.)
    """
    plain = value.lower()
    if kind not in ("email", "address"):  # there a point makes another address
        plain = re.sub(r"[\W_]", "", plain)
    digest = hmac.new(key, f"{kind}:{plain}".encode(), hashlib.sha256).hexdigest()
    return f"[{kind.upper()}-{digest[:10]}]"


def redact(text: str, *, key: bytes | None = None, kinds: Iterable[str] | None = None) -> str:
    """Return the text with everything that `find_personal_data` finds replaced.

    Args:
        text: Any text.
        key: None: each finding becomes its kind, "[EMAIL]". A secret of at least 16 bytes: it becomes a pseudonym,
            "[EMAIL-3fa9c02b71]", the same for the same value, so that two messages of one person stay together. That is
            personal data still: whoever has the key can test a guess.
        kinds: As `find_personal_data`.

    Raises:
        ValueError: The key is too short, or a kind is unknown.
        TypeError: `text` is no str.
    """
    require(
        "key",
        None if key is None else f"{len(key)} bytes",
        key is None or len(key) >= 16,
        "at least 16 bytes",
    )
    parts, place = [], 0
    for finding in find_personal_data(text, kinds):
        value = text[finding.start : finding.end]
        hidden = f"[{finding.kind.upper()}]" if key is None else pseudonym(finding.kind, value, key)
        parts += [text[place : finding.start], hidden]
        place = finding.end
    return "".join([*parts, text[place:]])
