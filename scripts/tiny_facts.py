"""The facts that the tiny model knows: tables, one row a fact, nothing else.

Every row is meant to be true and undisputed; where a country, a sum or a word would need a footnote, it is left out. A table
is a tuple of rows, a row a tuple of columns, and ``-`` marks a column that we'd rather not fill. How a fact is worded is
the business of ``tiny_corpus.py``.
"""


def rows(table: str) -> tuple[tuple[str, ...], ...]:
    """Split a table into rows (one a line, or divided by ``;``) and columns (divided by ``|``)."""
    lines = table.replace("\n", ";").split(";")
    return tuple(tuple(cell.strip() for cell in line.split("|")) for line in lines if line.strip())


COUNTRIES = rows("""
France|Paris|Europe|French|euro
Germany|Berlin|Europe|German|euro
Italy|Rome|Europe|Italian|euro
Spain|Madrid|Europe|Spanish|euro
Portugal|Lisbon|Europe|Portuguese|euro
Austria|Vienna|Europe|German|euro
Greece|Athens|Europe|Greek|euro
Finland|Helsinki|Europe|Finnish|euro
Ireland|Dublin|Europe|-|euro
Belgium|Brussels|Europe|-|euro
Estonia|Tallinn|Europe|Estonian|euro
Latvia|Riga|Europe|Latvian|euro
Lithuania|Vilnius|Europe|Lithuanian|euro
Slovakia|Bratislava|Europe|Slovak|euro
Slovenia|Ljubljana|Europe|Slovene|euro
Croatia|Zagreb|Europe|Croatian|euro
Malta|Valletta|Europe|-|euro
England|London|Europe|English|pound
Scotland|Edinburgh|Europe|English|pound
Wales|Cardiff|Europe|-|pound
Poland|Warsaw|Europe|Polish|zloty
Hungary|Budapest|Europe|Hungarian|forint
Czechia|Prague|Europe|Czech|koruna
Romania|Bucharest|Europe|Romanian|leu
Bulgaria|Sofia|Europe|Bulgarian|-
Denmark|Copenhagen|Europe|Danish|krone
Norway|Oslo|Europe|Norwegian|krone
Sweden|Stockholm|Europe|Swedish|krona
Iceland|Reykjavik|Europe|Icelandic|krona
Serbia|Belgrade|Europe|Serbian|dinar
Albania|Tirana|Europe|Albanian|lek
Ukraine|Kyiv|Europe|Ukrainian|hryvnia
Japan|Tokyo|Asia|Japanese|yen
China|Beijing|Asia|Chinese|yuan
India|New Delhi|Asia|-|rupee
Nepal|Kathmandu|Asia|Nepali|rupee
Pakistan|Islamabad|Asia|-|rupee
Bangladesh|Dhaka|Asia|Bengali|taka
Thailand|Bangkok|Asia|Thai|baht
Vietnam|Hanoi|Asia|Vietnamese|dong
Laos|Vientiane|Asia|Lao|kip
Cambodia|Phnom Penh|Asia|Khmer|riel
Mongolia|Ulaanbaatar|Asia|Mongolian|tugrik
South Korea|Seoul|Asia|Korean|won
Iran|Tehran|Asia|Persian|rial
Iraq|Baghdad|Asia|Arabic|dinar
Jordan|Amman|Asia|Arabic|dinar
Lebanon|Beirut|Asia|Arabic|pound
Saudi Arabia|Riyadh|Asia|Arabic|riyal
Oman|Muscat|Asia|Arabic|rial
Qatar|Doha|Asia|-|riyal
Afghanistan|Kabul|Asia|-|afghani
Uzbekistan|Tashkent|Asia|Uzbek|-
Egypt|Cairo|Africa|Arabic|pound
Morocco|Rabat|Africa|Arabic|dirham
Algeria|Algiers|Africa|Arabic|dinar
Tunisia|Tunis|Africa|Arabic|dinar
Libya|Tripoli|Africa|Arabic|dinar
Ethiopia|Addis Ababa|Africa|-|birr
Kenya|Nairobi|Africa|-|shilling
Uganda|Kampala|Africa|-|shilling
Rwanda|Kigali|Africa|-|franc
Ghana|Accra|Africa|-|cedi
Nigeria|Abuja|Africa|-|naira
Senegal|Dakar|Africa|-|franc
Angola|Luanda|Africa|Portuguese|kwanza
Zambia|Lusaka|Africa|-|kwacha
Mozambique|Maputo|Africa|-|metical
Madagascar|Antananarivo|Africa|Malagasy|ariary
Namibia|Windhoek|Africa|-|dollar
Somalia|Mogadishu|Africa|Somali|shilling
Canada|Ottawa|North America|-|dollar
Mexico|Mexico City|North America|Spanish|peso
Cuba|Havana|North America|Spanish|peso
Jamaica|Kingston|North America|-|dollar
Honduras|Tegucigalpa|North America|Spanish|lempira
Panama|Panama City|North America|Spanish|balboa
Brazil|Brasilia|South America|Portuguese|real
Argentina|Buenos Aires|South America|Spanish|peso
Peru|Lima|South America|Spanish|sol
Colombia|Bogota|South America|Spanish|peso
Venezuela|Caracas|South America|Spanish|bolivar
Ecuador|Quito|South America|Spanish|dollar
Uruguay|Montevideo|South America|Spanish|peso
Suriname|Paramaribo|South America|Dutch|dollar
Australia|Canberra|Oceania|English|dollar
New Zealand|Wellington|Oceania|English|dollar
""")
"""Country, capital, continent, main language, currency."""

STATES = rows("""
Alabama|Montgomery; Alaska|Juneau; Arizona|Phoenix; Arkansas|Little Rock; California|Sacramento; Colorado|Denver
Connecticut|Hartford; Delaware|Dover; Florida|Tallahassee; Hawaii|Honolulu; Idaho|Boise; Illinois|Springfield
Indiana|Indianapolis; Iowa|Des Moines; Kansas|Topeka; Kentucky|Frankfort; Louisiana|Baton Rouge; Maine|Augusta
Maryland|Annapolis; Massachusetts|Boston; Michigan|Lansing; Minnesota|Saint Paul; Mississippi|Jackson
Missouri|Jefferson City; Montana|Helena; Nebraska|Lincoln; Nevada|Carson City; New Hampshire|Concord; New Jersey|Trenton
New Mexico|Santa Fe; North Carolina|Raleigh; Ohio|Columbus; Oklahoma|Oklahoma City; Oregon|Salem
Pennsylvania|Harrisburg; Rhode Island|Providence; South Dakota|Pierre; Tennessee|Nashville; Texas|Austin
Utah|Salt Lake City; Vermont|Montpelier; Virginia|Richmond; Wisconsin|Madison; Wyoming|Cheyenne
""")
"""State of the United States, its capital."""

ELEMENTS = rows("""
hydrogen|H|1; helium|He|2; lithium|Li|3; beryllium|Be|4; boron|B|5; carbon|C|6; nitrogen|N|7; oxygen|O|8; fluorine|F|9
neon|Ne|10; sodium|Na|11; magnesium|Mg|12; aluminium|Al|13; silicon|Si|14; phosphorus|P|15; sulfur|S|16; chlorine|Cl|17
argon|Ar|18; potassium|K|19; calcium|Ca|20; scandium|Sc|21; titanium|Ti|22; vanadium|V|23; chromium|Cr|24
manganese|Mn|25; iron|Fe|26; cobalt|Co|27; nickel|Ni|28; copper|Cu|29; zinc|Zn|30; gallium|Ga|31; germanium|Ge|32
arsenic|As|33; selenium|Se|34; bromine|Br|35; krypton|Kr|36; rubidium|Rb|-; strontium|Sr|-; yttrium|Y|-
zirconium|Zr|-; niobium|Nb|-; molybdenum|Mo|-; silver|Ag|47; cadmium|Cd|-; indium|In|-; tin|Sn|-; antimony|Sb|-
tellurium|Te|-; iodine|I|-; xenon|Xe|-; caesium|Cs|-; barium|Ba|-; tungsten|W|-; platinum|Pt|-; gold|Au|79
mercury|Hg|80; lead|Pb|-; radon|Rn|-; radium|Ra|-; uranium|U|-; plutonium|Pu|-
""")
"""Chemical element, symbol, atomic number."""

ANIMALS = rows("""
cat|mammal|kitten|meows; dog|mammal|puppy|barks; cow|mammal|calf|moos; horse|mammal|foal|neighs; sheep|mammal|lamb|bleats
goat|mammal|kid|-; pig|mammal|piglet|oinks; lion|mammal|cub|roars; wolf|mammal|pup|howls; donkey|mammal|foal|brays
elephant|mammal|calf|trumpets; mouse|mammal|pup|squeaks; bear|mammal|cub|growls; tiger|mammal|cub|-; deer|mammal|fawn|-
kangaroo|mammal|joey|-; koala|mammal|joey|-; giraffe|mammal|calf|-; whale|mammal|calf|-; dolphin|mammal|calf|-
zebra|mammal|foal|-; hare|mammal|leveret|-; otter|mammal|pup|-; bat|mammal|pup|-; camel|mammal|calf|-; beaver|mammal|kit|-
leopard|mammal|cub|-; hedgehog|mammal|hoglet|-; squirrel|mammal|-|-; chicken|bird|chick|clucks; duck|bird|duckling|quacks
goose|bird|gosling|honks; swan|bird|cygnet|-; eagle|bird|eaglet|-; owl|bird|owlet|hoots; turkey|bird|poult|gobbles
pigeon|bird|squab|coos; penguin|bird|chick|-; ostrich|bird|chick|-; crow|bird|-|caws; sparrow|bird|-|chirps
parrot|bird|-|squawks; robin|bird|-|-; stork|bird|-|-; frog|amphibian|tadpole|croaks; toad|amphibian|tadpole|-
newt|amphibian|-|-; salamander|amphibian|-|-; snake|reptile|-|hisses; lizard|reptile|-|-; tortoise|reptile|-|-
crocodile|reptile|-|-; chameleon|reptile|-|-; gecko|reptile|-|-; salmon|fish|-|-; trout|fish|-|-; tuna|fish|-|-
shark|fish|pup|-; eel|fish|elver|-; herring|fish|-|-; cod|fish|-|-; bee|insect|-|buzzes; ant|insect|-|-; wasp|insect|-|-
beetle|insect|-|-; butterfly|insect|caterpillar|-; moth|insect|caterpillar|-; grasshopper|insect|nymph|-
cricket|insect|-|chirps; mosquito|insect|-|whines; spider|arachnid|spiderling|-; scorpion|arachnid|-|-; crab|crustacean|-|-
lobster|crustacean|-|-; shrimp|crustacean|-|-; snail|mollusc|-|-; octopus|mollusc|-|-; squid|mollusc|-|-
""")
"""Animal, kind of animal, name of its young, what it does to make itself heard."""

OPPOSITES = rows("""
hot|cold; big|small; tall|short; heavy|light; fast|slow; hard|soft; wet|dry; full|empty; clean|dirty; rich|poor
strong|weak; old|young; early|late; near|far; deep|shallow; wide|narrow; thick|thin; loud|quiet; sharp|blunt; rough|smooth
happy|sad; brave|cowardly; wise|foolish; true|false; open|closed; cheap|expensive; safe|dangerous; easy|difficult
sweet|sour; generous|stingy; polite|rude; careful|careless; asleep|awake; dead|alive; guilty|innocent; bright|dim
beautiful|ugly; ancient|modern; tight|loose; straight|crooked; up|down; above|below; inside|outside; always|never
before|after; forwards|backwards; left|right; north|south; east|west; day|night; summer|winter; love|hate; war|peace
friend|enemy; victory|defeat; profit|loss; question|answer; beginning|end; success|failure; arrival|departure
attack|defence; buy|sell; give|take; push|pull; win|lose; remember|forget; arrive|leave; laugh|cry; accept|refuse
increase|decrease; build|destroy; borrow|lend; begin|finish; float|sink; freeze|melt; maximum|minimum; entrance|exit
""")
"""Word, its opposite."""

PAST_TENSES = rows("""
go|went; see|saw; eat|ate; drink|drank; sing|sang; swim|swam; run|ran; come|came; write|wrote; drive|drove; ride|rode
speak|spoke; break|broke; choose|chose; steal|stole; wake|woke; fly|flew; grow|grew; know|knew; throw|threw; draw|drew
blow|blew; bring|brought; think|thought; catch|caught; teach|taught; seek|sought; fight|fought; feel|felt; keep|kept
sleep|slept; meet|met; find|found; hold|held; stand|stood; understand|understood; tell|told; say|said; send|sent
spend|spent; bend|bent; fall|fell; forgive|forgave; become|became; shake|shook; hide|hid; bite|bit; tear|tore; wear|wore
swear|swore; freeze|froze; rise|rose; ring|rang; make|made; have|had; do|did; get|got; shoot|shot; hear|heard; sit|sat
""")
"""Verb, its past tense."""

PLURALS = rows("""
child|children; man|men; woman|women; foot|feet; tooth|teeth; goose|geese; mouse|mice; ox|oxen; leaf|leaves; loaf|loaves
knife|knives; wife|wives; life|lives; wolf|wolves; half|halves; shelf|shelves; thief|thieves; calf|calves; city|cities
baby|babies; lady|ladies; berry|berries; crisis|crises; oasis|oases; potato|potatoes; hero|heroes; box|boxes; church|churches
""")
"""Noun, its plural."""

WORDS = rows("""
dog|chien|perro; cat|chat|gato; horse|cheval|caballo; bird|oiseau|pájaro; fish|poisson|pez; cow|vache|vaca
house|maison|casa; door|porte|puerta; window|fenêtre|ventana; table|table|mesa; chair|chaise|silla; bed|lit|cama
book|livre|libro; tree|arbre|árbol; flower|fleur|flor; water|eau|agua; bread|pain|pan; milk|lait|leche; cheese|fromage|queso
apple|pomme|manzana; egg|œuf|huevo; salt|sel|sal; sugar|sucre|azúcar; wine|vin|vino; sun|soleil|sol; moon|lune|luna
star|étoile|estrella; sky|ciel|cielo; sea|mer|mar; mountain|montagne|montaña; river|rivière|río; rain|pluie|lluvia
snow|neige|nieve; wind|vent|viento; fire|feu|fuego; hand|main|mano; head|tête|cabeza; eye|œil|ojo; mouth|bouche|boca
heart|cœur|corazón; mother|mère|madre; father|père|padre; brother|frère|hermano; sister|soeur|hermana; friend|ami|amigo
king|roi|rey; queen|reine|reina; school|école|escuela; street|rue|calle; garden|jardin|jardín; key|clé|llave
""")
"""English word, French word, Spanish word."""

PROFESSIONS = rows("""
baker|bakes bread; teacher|teaches pupils; farmer|grows crops; pilot|flies aeroplanes; tailor|sews clothes
carpenter|works with wood; plumber|repairs water pipes; dentist|treats teeth; barber|cuts hair; butcher|sells meat
painter|paints pictures; potter|makes pots from clay; gardener|tends plants; fisherman|catches fish; beekeeper|keeps bees
shepherd|looks after sheep; librarian|lends books; judge|decides cases in court; firefighter|puts out fires
photographer|takes photographs; astronomer|studies the stars; botanist|studies plants; geologist|studies rocks
zoologist|studies animals; translator|translates texts; architect|designs buildings; surgeon|performs operations
chef|cooks meals; waiter|serves food; composer|writes music; poet|writes poems; sculptor|carves statues
blacksmith|forges iron; locksmith|opens locks; cobbler|mends shoes; miner|works underground; sailor|works on a ship
astronaut|travels into space; vet|treats sick animals; florist|sells flowers; jeweller|sells jewels; bricklayer|builds walls
cartographer|draws maps; conductor|leads an orchestra; goalkeeper|guards the goal; optician|sells glasses
""")
"""Profession, what one who has it does."""

TOOLS = rows("""
hammer|driving nails; saw|cutting wood; spade|digging holes; needle|sewing cloth; thermometer|measuring temperature
compass|finding north; telescope|looking at the stars; microscope|seeing very small things; clock|telling the time
ruler|drawing straight lines; broom|sweeping the floor; kettle|boiling water; oven|baking bread; umbrella|keeping off the rain
pencil|writing and drawing; ladder|climbing up; net|catching fish; key|opening a lock; candle|giving light; pillow|resting the head
scale|weighing things; barometer|measuring air pressure; camera|taking pictures; razor|shaving; comb|tidying hair; towel|drying the hands
screwdriver|turning screws; anchor|holding a ship in place; bucket|carrying water; plough|turning the soil; tap|letting water run
calculator|working out sums; parachute|slowing a fall; microphone|picking up sound; fridge|keeping food cold; rope|tying things
eraser|rubbing out pencil marks; whistle|giving a signal; wheelbarrow|moving soil; magnet|attracting iron; sieve|straining flour
""")
"""Tool, what it is used for."""

WORKS = rows("""
Hamlet|William Shakespeare; Macbeth|William Shakespeare; Don Quixote|Miguel de Cervantes; Faust|Johann Wolfgang von Goethe
War and Peace|Leo Tolstoy; Anna Karenina|Leo Tolstoy; Crime and Punishment|Fyodor Dostoevsky; Emma|Jane Austen
Pride and Prejudice|Jane Austen; Oliver Twist|Charles Dickens; Great Expectations|Charles Dickens; Jane Eyre|Charlotte Brontë
Wuthering Heights|Emily Brontë; Frankenstein|Mary Shelley; Dracula|Bram Stoker; Moby Dick|Herman Melville; Ulysses|James Joyce
Treasure Island|Robert Louis Stevenson; Robinson Crusoe|Daniel Defoe; Les Misérables|Victor Hugo; Candide|Voltaire
Madame Bovary|Gustave Flaubert; The Three Musketeers|Alexandre Dumas; The Stranger|Albert Camus; The Trial|Franz Kafka
The Divine Comedy|Dante Alighieri; The Decameron|Giovanni Boccaccio; The Aeneid|Virgil; The Hobbit|J. R. R. Tolkien
Animal Farm|George Orwell; Brave New World|Aldous Huxley; Lord of the Flies|William Golding; The Great Gatsby|F. Scott Fitzgerald
The Old Man and the Sea|Ernest Hemingway; The Jungle Book|Rudyard Kipling; Peter Pan|J. M. Barrie; The Time Machine|H. G. Wells
The Little Prince|Antoine de Saint-Exupéry; Pippi Longstocking|Astrid Lindgren; Pinocchio|Carlo Collodi; Heidi|Johanna Spyri
The Magic Mountain|Thomas Mann; Doctor Zhivago|Boris Pasternak; A Doll's House|Henrik Ibsen; The Seagull|Anton Chekhov
""")
"""Book or play, its author."""

PLANETS = rows(
    "Mercury|first; Venus|second; Earth|third; Mars|fourth; Jupiter|fifth; Saturn|sixth; Uranus|seventh; Neptune|eighth"
)
"""Planet, its place counted from the Sun."""

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = ("January", "February", "March", "April", "May", "June")
MONTHS += ("July", "August", "September", "October", "November", "December")

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
NUMBERS += ("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty")

SHAPES = rows(
    "triangle|three; square|four; pentagon|five; hexagon|six; heptagon|seven; octagon|eight; nonagon|nine; decagon|ten"
)
"""Shape, its number of sides."""
