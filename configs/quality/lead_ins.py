"""Texts that chunks may be encoded behind, as candidates for the default one; `PromptFormat` says what they are for.

What stands in them is in no task: prose of a small town, records of things that don't exist, random identifiers.
"""

from cacheclip_jax.prompt import LEAD_IN

BEGINNING = LEAD_IN.partition("\n\n")[2]  # of the prose, behind the identifiers
PROSE = BEGINNING + """\
The reading of old maps is a patient trade. A river that has moved leaves a boundary behind it, and a road that was
never built may be drawn as firmly as one that carries traffic every day. Surveyors copied one another, mistakes
included, so that a village which burned down in one century was still being drawn in the next.

Paper is made of fibres, water and pressure. The first mill in the valley used rags; later ones used straw, which made
a brittle yellow sheet, and finally wood. Each change made books cheaper and shorter-lived. Librarians keep the worst
of them in dark boxes and turn the pages with a strip of bone.

Apples are stored in the north of the country until April. The cellar must be cool and a little damp, the fruit must
not touch, and whoever goes down for one takes the worst, not the best. By spring every one that was taken had been the
worst that day, and the cellar is empty.
"""
RECORDS = """id;name;town;since;keys
0417;Marten Oule;Brask;1998;3
0533;T. Okafor;Brask;2011;7

{"part": "valve 7", "code": "c41f-92d0-77ae", "stock": 14, "shelf": "B2"}

2021-03-04 07:15:22 pump-3 started, pressure 4.1 bar

The number of the blue locker is 5523908.
Parcel 9d3e61b2-4f70-4c88-a1d5-0be7c2395fa4 belongs to 62af80c7-19d4-4b3e-8c05-d7f14a9e3b60.
x = 4417; width = x; height = width; depth = 902
1. lantern 2. quarry 3. lantern 4. saddle 5. quarry 6. lantern

"""

LEAD_INS = {"prose": PROSE, "records": RECORDS, "records, prose": RECORDS + BEGINNING.partition("\nMigrating")[0],
            "identifiers, prose": LEAD_IN}
