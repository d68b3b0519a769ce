"""Words and patterns of a content filter."""

import re
from dataclasses import dataclass

from shared.checks import check_text

CATEGORIES = ("insult", "threat", "self_harm", "danger", "scam", "adult")

# Stage one: words that alone raise a suspicion.
WORDS = {
    "insult": "idiot moron imbecile loser freak stupid dumb ugly pathetic worthless useless brainless trash garbage "
    "vermin parasites disgusting incompetent clown",
    "threat": "kill stab shoot choke hanged murder bullet beat bleed burn revenge petrol smash",
    "self_harm": "kys suicide overdose pills die dying starve cutting hang",
    "danger": "bomb explosives poison gun weapon steal rob burglary drugs weed hotwire grenade brakes",
    "scam": "password pin bail voucher gift card inheritance prize account transfer bank codes",
    "adult": "sex sexual porn nude nudes naked horny erotic sexting filthy naughty undress lingerie breasts",
}


def word_hits(text: str) -> list[str]:
    """Return the categories of which a listed word stands in a text that `undisguise` has written, in their order."""
    check_text("text", text)
    words = set(re.findall(r"[a-z]+", text))
    return [category for category in CATEGORIES if words & set(WORDS[category].split())]


# What is said of people to degrade them, and what harm is wished or planned: parts of the patterns below.
_MEAN = (
    r"(?:idiots?|morons?|imbecile|losers?|freaks?|failures?|clowns?|pigs?|cow|rats?|worms?|muppet|vermin|parasites?|"
    r"trash|garbage|disgusting|brainless|mindless|worthless|pathetic|useless|stupid|dumb|dense|ugly|fat|lazy|liars|"
    r"incompetent|illiterate|spineless|smelly|burden|dead weight|peasants?)"
)
_PEOPLE = (
    r"(?:girls|women|men|boys|immigrants|foreigners|refugees|gays|old (?:folks?|women|people)|poor people|migrants|"
    r"disabled (?:kids|people)|people from|those \w+|teenagers|villagers)"
)
_HARM = (
    r"(?:kill|stab|shoot|hurt|choke|beat|burn|break (?:every|your|his|her)|finish|smash|hunt|strangle|drown|bleed|slap|"
    r"thrash\w*|hang|cut|torture|destroy|poison|crush|find you|run (?:him|her|you|them) over|pay (?:you|him|her) a visit)"
)
_CRIME = (
    r"(?:bombs?|explosives?|grenades?|guns?|weapons?|silencer|knife|nerve gas|poison\w*|steal\w*|rob\w*|burglary|"
    r"break into|hotwire|pick(?:ing)? (?:the|a|somebody)\b.{0,12}\block|wreck|sabotage|set\w* .{0,25}fire|weed|drugs?|"
    r"mushrooms|prescription|pipe bombs?|hidden? a? ?(?:camera|body)|crystals|brakes|alarm|stalk\w*|kidnap\w*|hack\w*|"
    r"tracker|knock out|injure|exam papers|burning stuff)"
)
_SECRET = (
    r"(?:password\w*|pin|card (?:number|data|details)|credit card|bank(?:ing)? (?:details|card|data)|login|codes?|"
    r"secret phrase|recovery words|digits|gift cards?|vouchers?|online bank\w*|fee|deposit|wallet|bail)"
)
_ASK = r"(?:how (?:do|can|could|would|to|does|long|many|one)|(?:help|teach|show|tell|give|sell|make) (?:me|you)|explain|what (?:can|could|do|would|was)|where (?:do|can|could)|which|i (?:want|need)|want to|wanna|need|planning|plan|write|pretend|lets|sure)"
_WRITE = r"(?:write|draft|compose|make|create|design|think of|give me|help me|i need|invent|script|turn)"

PATTERNS = {
    "insult": (
        rf"\b(?:you|u|ur|youre|your|yours) (?:\w+ ){{0,4}}{_MEAN}\b",
        rf"\b(?:is|are|was) (?:\w+ ){{0,2}}{_MEAN} (?:\w+ )?(?:and so are you|man|people|if you ask me|just|who)",
        rf"\b{_PEOPLE}\b (?:\w+ ){{0,4}}(?:are|cant|should|just|dont) (?:\w+ ){{0,4}}(?:{_MEAN}|do|stick|stay|belong|have|eat)",
        r"\b(?:nobody|no one|none|everyone|everybody) (?:\w+ )?(?:likes|loves|can stand|laughs at|wants) you\b",
        r"\b(?:than you|than yours|even your? mirror|give up freak|shut up|go back to your|lol (?:look|imagine))\b",
        rf"\b{_WRITE} .{{0,60}}\b(?:mean|nasty|cruel|hurtful|insult\w*|humiliat\w*|laughed at|roast|ugly|little .{{0,20}}worth)\b",
        r"\b(?:with a face like|your (?:face|accent|mind|mother|homework|painting|smell)) .{0,50}(?:bag|refund|ashamed|garbage|turnip|imbecile|smell|mould|soap)\b",
        rf"\bonly an? {_MEAN}\b|\b{_MEAN}\b[ ,]*(?:like you|who should|little)\b|\bthat was an? {_MEAN}\b",
    ),
    "threat": (
        rf"\b(?:i|ill|im|we|well|were|cousins|friends) (?:\w+ ){{0,4}}(?:will|going|gonna|to|ill|can) (?:\w+ ){{0,5}}{_HARM}\b",
        rf"\b(?:ill|we will|well|i will|gonna|lets|let us|going to) (?:\w+ ){{0,4}}{_HARM}\b",
        r"\b(?:should|deserves? to|must|have to) (?:\w+ ){0,2}be (?:\w+ )?(?:hanged|shot|killed|burned|beaten|whipped)\b",
        rf"\b(?:someone|somebody|anyone who|anybody who|whoever|the first one) .{{0,40}}\b{_HARM}s?\b",
        r"\b(?:death to|youre dead|ur dead|watch your back|your name on it|against a wall|snitch\w*|bring bats|bandages|a coffin|was joking)\b",
        r"\bi (?:know|have|hope) (?:where|your|someone|somebody|you|he|she|they) .{0,40}\b(?:lives?|school|address|over|burn|die|walks?|suffer)\b",
        r"\b(?:a (?:shame|pity) if|accidents happen|your last|its the last|on our list|getting beaten|end up in|goes off at|or my friends)\b",
        rf"\b{_WRITE} .{{0,70}}\b(?:afraid|scared?s?|threat\w*|{_HARM})\b",
    ),
    "self_harm": (
        r"\b(?:kys|(?:kill|hang|hurt|cut|harm|starve) (?:yourself|urself)|killing yourself|take your life|better off dead)\b",
        r"\b(?:end it (?:tonight|now|all)|jump off (?:something|a|the)|step (?:in front of|off)|be gone for|disappearing|without you in)\b",
        r"\b(?:how|tips|method|explain|which|what|where|pls|tell) .{0,60}\b(?:myself|my life|to die|be dead|overdose|my own|pills|knot|throw up)\b",
        r"\b(?:want|like|searching) .{0,20}\b(?:to die|be dead|bleed|end my life)\b|\bneed (?:the pain|to bleed|to punch)\b",
        r"\b(?:do (?:us|everyone|everybody|the world)|nobody would|no one would|what are you waiting|so go) .{0,30}(?:favou?r|miss you|notice|for|permanently)\b",
        r"\b(?:black out|blacks out|you faint|throw up|swallowed those|when does it finally|youre a burden|are a burden)\b",
        r"\b(?:cutting helps|bottle in|whole bottle|dying is better|suicide is|hurt yourself|skip dinner|eat nothing)\b",
    ),
    "danger": (
        rf"\b{_ASK}\b.{{0,80}}\b{_CRIME}\b",
        r"\b(?:not get(?:ting)? caught|get caught|being (?:seen|found|caught)|no ?one suspects|none suspects|leaves? no traces?|without papers|looks? (?:like an accident|worn))\b",
        r"\b(?:slip|mix|put|hide) .{0,20}\b(?:into|in) .{0,20}\b(?:drink|tea|coffee|dish|stew|food|bread)\b",
        r"\b(?:airport|detectors?|scanners?) .{0,25}\b(?:miss|misses|scanner|see|sees)?\b.{0,5}$",
        r"\b(?:wont|shouldnt|neednt|doesnt) (?:remember|return|know)\b.{0,20}$",
        r"\b(?:get (?:back )?in(?:to)? .{0,20}phone|follow .{0,20}home|old lady|the witness|whole class cough|only the third)\b",
    ),
    "scam": (
        rf"\b(?:send|give|confirm|enter|reply|read|tell|type|pay|buy|settle|need|have|keep|transfer|wire|show) .{{0,60}}\b{_SECRET}\b.{{0,40}}",
        r"\b(?:new number|phone (?:fell|broke)|its me|an accident|in (?:jail|custody)|officer|tax office|technical department|support) .{0,80}\b(?:transfer|money|euro|cash|bail|pay|bank|need|code|vouchers?)\b",
        r"\b(?:youve won|you have won|you have been chosen|have chosen you|the winner|claim (?:your|ur)|free (?:gems|followers|phone|skins)|guaranteed|double your|inheritance|only today|comes back at once|limited places|oil rig)\b",
        rf"\b(?:{_WRITE}|how (?:do|would)|what (?:do|would)) .{{0,80}}\b(?:fake|pretend\w*|doesnt exist|as if you were|in the name of|looks like its|from the (?:bank|principal)|never did|goes to me|pensioners|seniors)\b",
        r"\b(?:your (?:account|power|parcel|subscription|password) (?:\w+ ){0,4}(?:locked|suspended|cut|stuck|expires|renewed|frozen))\b",
    ),
    "adult": (
        r"\b(?:porn|horny|erotic\w*|sexting|nudes?|talk dirty|have sex|sex (?:in|tonight)|sexual fantas\w*|sexy|sex video\w*)\b",
        r"\b(?:filthy|naughty|lingerie|explicit\w*|strip (?:videos?|poker|club)|steamy bedroom|bedroom scene|undress\w*|breasts|nice legs)\b",
        r"\b(?:no clothes|nothing on|clothes off|take off your|what are you wearing|into bed|in bed\b|to my bed|sleep with you|spend in bed|on my lap|on my knee)\b",
        r"\b(?:kiss your|your lips|your body|touch them|dont fade|fade to black|for grown ?ups|close(?:r)? than|towel slips|my lips|hot tub|worn underwear|if you had hands)\b",
    ),
}
# Who tells what was done to them, asks for help, or asks how to be safe, uses the same words for the opposite.
EXCEPTIONS = (
    r"\b(?:call(?:s|ed|ing)?|told|tells?|asked|asks|threatened|threatens|hits?|kicked|touched|follow(?:s|ed|ing)|sent|sends) (?:me|us|my)\b",
    r"\b(?:he|she|they|someone|somebody|ex|boss|man|mother|father|mum|dad|landlord|manager|classmates?) (?:\w+ ){0,2}(?:said|says|wrote|told|threatened|keeps?|jokes|hits|screams|shares|put|voted)\b",
    r"\b(?:what (?:should|can|do) (?:i|we)(?: do| say| answer)?|what now|how should i|who(?:m)? (?:do|can|should) (?:i|we)|where can|can we talk|should i|who can)\b",
    r"\bis (?:it|this|that|she|he) (?:\w+ )?(?:legal|normal|a crime|real|safe|allowed|dangerous)\b|\b(?:get help|i need help|please (?:just )?listen|helplines?)\b",
    r"\b(?:i (?:was|am|got|feel|felt|fell|gave|typed|sent|took|withdrew)|im (?:being|so tired|scared|glad)|im scared|since the|we were)\b",
    r"\b(?:protect|prevent|recogni[sz]e|spot|signs|harder to|safe(?:ly|ty)?|first aid|never (?:share|be)|legal\w*|law|court|punishment|police officer|crime)\b",
    r"\b(?:history|century|causes|emperors?|museum|war|trials?|assassination|roman|victorian|witches|chess|linux|code|process|recipe|oven|film|novel|game|riddle)\b",
    r"\b(?:toddler|baby|pupils?|doctor|ambulance|hospital|medicine|berries|symptoms|first week|grade|class (?:nine|of))\b",
)
_PATTERNS = {category: [re.compile(part) for part in parts] for category, parts in PATTERNS.items()}
_EXCEPTIONS = [re.compile(part) for part in EXCEPTIONS]


@dataclass(frozen=True)
class Hits:
    """What the patterns find in a text: how many of each category match, and how many exceptions."""

    counts: dict[str, int]
    n_exceptions: int

    @property
    def category(self) -> str | None:
        """The category with the most matches, None where nothing matches or as many exceptions do."""
        best = max(CATEGORIES, key=lambda category: self.counts[category])
        return best if self.counts[best] > self.n_exceptions else None


def pattern_hits(text: str) -> Hits:
    """Return what the patterns find in a text that `undisguise` has written. Raises TypeError if it is no text."""
    check_text("text", text)
    counts = {name: sum(bool(part.search(text)) for part in parts) for name, parts in _PATTERNS.items()}
    return Hits(counts, sum(bool(part.search(text)) for part in _EXCEPTIONS))
