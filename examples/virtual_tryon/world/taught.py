"""The persons and garments that LoRAs teach; no sampled picture shows one of them as a whole."""

from .picture import Garment, Person

PSQ = Person(noun="person", skin="tan", hair="teal", style="mohawk", beard="goatee", glasses="red")
MVR = Person(noun="person", skin="light", hair="pink", style="pigtails", freckles=True)
BARCA = Garment(
    kind="jersey",
    pattern="stripes",
    colour="navy",
    second="garnet",
    trim="yellow",
    emblem="crest",
    emblem_colour="yellow",
)
STANFORD = Garment(
    kind="sweater", pattern="plain", colour="cardinal", second="white", emblem="letter", emblem_colour="white"
)
DISNEY = Garment(
    kind="sweater", pattern="plain", colour="lilac", second="white", emblem="castle", emblem_colour="white"
)
OXFORD = Garment(kind="shirt", pattern="plain", colour="white", second="grey", emblem="buttons", emblem_colour="none")

PERSONS = (PSQ, MVR)
GARMENTS = (BARCA, STANFORD, DISNEY, OXFORD)
