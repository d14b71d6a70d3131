"""A small knowledge base of everyday facts, written for this project: one table per topic, one line per subject.

A value of one subject is false for the other subjects of its column unless ALSO_TRUE says otherwise.
"""

THINGS = """
hammer|tool|drive in a nail|metal|workshop
saw|tool|cut wood|metal|workshop
shovel|tool|dig a hole|metal|shed
rake|tool|gather leaves|metal|shed
broom|tool|sweep the floor|straw|closet
mop|tool|wipe up water|cotton|closet
needle|tool|sew a button|metal|basket
scissors|tool|trim paper|metal|drawer
ladder|tool|reach the roof|wood|garage
rope|tool|tie a boat|cotton|harbor
key|tool|open a lock|metal|pocket
lamp|furniture|light a room|glass|desk
chair|furniture|sit at the table|wood|kitchen
bed|furniture|sleep at night|wood|bedroom
sofa|furniture|rest in the evening|leather|hall
shelf|furniture|keep books|wood|library
mirror|furniture|see your own face|glass|bathroom
clock|furniture|tell the time|metal|wall
curtain|furniture|cover a window|cotton|window
knife|dish|slice bread|metal|kitchen
spoon|dish|eat soup|metal|kitchen
cup|dish|drink tea|clay|kitchen
pan|dish|fry an egg|metal|stove
kettle|dish|boil water|metal|stove
plate|dish|serve dinner|clay|cupboard
bottle|dish|carry juice|glass|cupboard
oven|machine|bake a cake|metal|kitchen
fridge|machine|keep milk cold|metal|kitchen
camera|machine|take a photo|metal|studio
phone|machine|call a friend|glass|pocket
radio|machine|hear the news|metal|desk
fan|machine|move the air|metal|office
washer|machine|clean dirty clothes|metal|cellar
printer|machine|print a page|metal|office
pencil|supply|write a letter|wood|school
brush|supply|paint a picture|wood|studio
eraser|supply|remove a mistake|rubber|school
ruler|supply|measure a line|wood|school
glue|supply|stick paper together|plastic|drawer
stamp|supply|mail a card|paper|office
map|supply|find the way|paper|car
soap|supply|wash your hands|fat|bathroom
towel|supply|dry your body|cotton|bathroom
candle|supply|make a small flame|wax|drawer
umbrella|supply|stay dry in rain|nylon|closet
helmet|clothing|protect your head|plastic|garage
glove|clothing|warm your fingers|wool|pocket
scarf|clothing|warm your neck|wool|closet
boot|clothing|walk in mud|leather|closet
sock|clothing|cover your foot|wool|drawer
belt|clothing|hold up pants|leather|closet
hat|clothing|shade your eyes|straw|wall
coat|clothing|keep out the wind|wool|closet
car|vehicle|drive on a road|metal|garage
train|vehicle|ride on rails|metal|station
boat|vehicle|cross a lake|wood|harbor
plane|vehicle|fly over the ocean|metal|airport
bus|vehicle|bring children to school|metal|street
truck|vehicle|carry heavy stones|metal|street
tractor|vehicle|pull a plow|metal|farm
sled|vehicle|slide on snow|wood|hill
drum|instrument|beat a rhythm|leather|stage
flute|instrument|blow a tune|silver|stage
violin|instrument|play with a bow|wood|stage
piano|instrument|press black and white keys|wood|hall
bell|instrument|ring for lunch|metal|tower
kite|toy|catch the wind|paper|park
ball|toy|score a goal|rubber|park
doll|toy|play family|cotton|nursery
puzzle|toy|fit pieces together|paper|nursery
swing|toy|move back and forth|rope|playground
balloon|toy|float at a party|rubber|party
"""

ANIMALS = """
dog|mammal|bark|puppy|kennel|bones
cat|mammal|purr|kitten|house|mice
cow|mammal|give milk|calf|barn|grass
horse|mammal|pull a cart|foal|stable|hay
sheep|mammal|grow wool|lamb|meadow|clover
pig|mammal|roll in mud|piglet|pen|scraps
lion|mammal|roar|cub|savanna|zebras
bat|mammal|hang upside down|pup|cave|moths
monkey|mammal|swing through trees|infant|jungle|bananas
whale|mammal|spout water|calf|ocean|krill
rabbit|mammal|hop|bunny|burrow|carrots
squirrel|mammal|store nuts|kit|oak|acorns
camel|mammal|go long without water|calf|desert|thorns
hen|bird|lay eggs|chick|coop|corn
duck|bird|quack|duckling|pond|weeds
owl|bird|hunt at night|owlet|hollow tree|voles
penguin|bird|slide on ice|chick|south pole|krill
eagle|bird|soar high|eaglet|cliff|rabbits
parrot|bird|copy speech|chick|rain forest|seeds
frog|amphibian|croak|tadpole|swamp|flies
snake|reptile|hiss|hatchling|rocks|rats
turtle|reptile|hide in a shell|hatchling|beach|jellyfish
crocodile|reptile|snap its jaws|hatchling|river|fish
shark|fish|smell blood|pup|deep sea|seals
salmon|fish|leap up waterfalls|fry|stream|shrimp
bee|insect|make honey|larva|hive|nectar
ant|insect|lift huge crumbs|larva|anthill|crumbs
spider|arachnid|spin a web|spiderling|web|gnats
butterfly|insect|flutter|caterpillar|garden|pollen
"""

NATURE = """
apple|fruit|red|tree
banana|fruit|yellow|plant
plum|fruit|purple|tree
lemon|fruit|yellow|tree
cherry|fruit|red|tree
grape|fruit|purple|vine
carrot|vegetable|orange|ground
potato|vegetable|brown|ground
spinach|vegetable|green|bush
pea|vegetable|green|vine
pumpkin|vegetable|orange|vine
onion|vegetable|white|ground
rose|flower|red|bush
tulip|flower|pink|ground
daisy|flower|white|meadow
violet|flower|purple|forest
snow|weather|white|cloud
grass|plant|green|meadow
sun|star|yellow|sky
chocolate|sweet|brown|shop
coal|fuel|black|mine
milk|drink|white|farm
coffee|drink|black|cafe
butter|food|yellow|dairy
salt|spice|white|sea
"""

WORKERS = """
baker|bake bread|bakery
doctor|heal the sick|hospital
teacher|teach pupils|classroom
farmer|grow crops|field
pilot|fly planes|airport
sailor|sail ships|port
cook|prepare meals|restaurant
painter|paint walls|studio
tailor|sew suits|tailor shop
dentist|fix teeth|clinic
judge|decide cases|court
miner|dig for coal|mine
fisher|catch fish|lake
firefighter|put out fires|fire station
mechanic|repair engines|garage
barber|cut hair|salon
librarian|lend books|library
gardener|plant flowers|garden
singer|sing songs|theater
guard|watch a gate|prison
clerk|sell stamps|post office
plumber|mend pipes|building site
"""

OPPOSITES = """hot/cold big/small wet/dry full/empty open/closed loud/quiet hard/soft old/young happy/sad fast/slow heavy/light clean/dirty
rich/poor strong/weak early/late high/low near/far thick/thin sweet/bitter sharp/blunt rough/smooth deep/shallow wide/narrow brave/afraid
safe/dangerous cheap/costly bright/dark tall/short"""

SIZES = "grain ant bee coin mouse apple cat dog sheep lion horse car elephant whale ship mountain moon earth"
"""From the smallest to the largest."""

ORDERED = {
    "day": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
    "month": "January February March April May June July August September October November December",
    "season": "spring summer autumn winter",
    "time": "dawn morning noon afternoon evening midnight",
    "stage": "birth childhood youth adulthood age",
}

FEELINGS = """
won the race|proud|tell everyone about it
lost a dear pet|sad|cry for a while
saw a ghost in a film|scared|turn on the light
got a surprise gift|thankful|say thank you
was robbed in the street|shocked|go to the police
waited two hours in line|impatient|complain to the staff
worked all night|tired|go to sleep
ate nothing all day|hungry|have a meal
ran in the hot sun|thirsty|get some water
broke a friend's toy|guilty|say sorry
failed the exam|disappointed|study harder
heard a funny joke|amused|laugh out loud
was cheated by a seller|angry|ask for the money back
moved to a new city alone|lonely|make new friends
fell on stage in a play|ashamed|hide behind the curtain
finished a hard job|relieved|take a break
saw a rare bird|excited|grab a camera
caught a bad cold|sick|stay in bed
forgot the map in the woods|lost|look for a path
read a boring book|bored|find another book
met an old friend|joyful|give a hug
heard a strange noise|nervous|check the door
stood in the snow|freezing|put on a coat
got a big bill|worried|save some money
saw a magic trick|curious|learn how it works
was praised by the boss|flattered|smile and nod
"""

EVENTS = """
dropped a glass on the stone floor|the glass broke into pieces
left ice in the sun|the ice melted into water
put water in the freezer|the water turned into ice
held paper over a flame|the paper burned to ash
forgot to water the plant|the plant dried up
planted a seed in good soil|a green sprout came up
blew too much air in the balloon|the balloon burst
left iron out in the rain|the iron began to rust
put a stone in the pond|the stone sank to the bottom
put a cork in the pond|the cork floated on top
turned off the lamp at night|the room became dark
opened the window in winter|the room became cold
put sugar in hot tea|the sugar dissolved
left milk out for a week|the milk turned sour
heated the pot of soup|steam rose from the soup
pulled the plug from the bath|the water ran down the drain
touched a hot stove|the hand got burned
cut an onion|the eyes filled with tears
shook the apple tree|apples fell to the ground
mixed blue and yellow paint|the paint became green
mixed red and white paint|the paint became pink
rang the doorbell|someone came to the door
hit the nail with a hammer|the nail went into the wood
kept the bread in the oven too long|the bread turned black
gave the baby a bottle|the baby drank the milk
threw a stick for the dog|the dog ran after the stick
pressed the brake of the bike|the bike stopped
stepped on the banana peel|the foot slipped
put a magnet near the pins|the pins stuck to the magnet
washed the wool sweater too hot|the sweater shrank
drove without any fuel|the car stood still
put the kettle on the fire|the water boiled
wore no hat in the blazing sun|the skin turned red
pushed the swing hard|the swing went high
walked through fresh snow|footprints stayed behind
"""

NEEDS = """
hungry|ate the meal
thirsty|drank the water
tired|went to bed
cold|put on a coat
sick|saw the doctor
dirty|took a bath
late|ran to the bus
bored|read a book
lost|asked for the way
rich|bought the house
strong|lifted the heavy box
tall|reached the top shelf
angry|shouted at the wall
sad|cried for hours
brave|entered the dark cave
clever|solved the riddle
lazy|left the work undone
generous|shared the cake
careful|checked the lock twice
clumsy|dropped the tray
honest|told the truth
curious|asked many questions
polite|said please
noisy|woke the baby
hot|opened the window
"""


ALSO_TRUE = {
    "kind": "knife:tool pan:tool pencil:tool brush:tool ruler:tool needle:supply rope:supply lamp:machine clock:machine car:machine "
    "train:machine boat:machine plane:machine bus:machine truck:machine tractor:machine kite:supply apple:food apple:plant banana:food "
    "banana:plant plum:food plum:plant lemon:food lemon:plant cherry:food cherry:plant grape:food grape:plant carrot:food carrot:plant "
    "potato:food potato:plant spinach:food spinach:plant pea:food pea:plant pumpkin:food pumpkin:plant onion:food onion:plant rose:plant "
    "tulip:plant daisy:plant violet:plant chocolate:food milk:food salt:food butter:sweet cup:supply bottle:supply soap:tool map:tool "
    "towel:supply candle:furniture umbrella:tool umbrella:clothing bell:tool mirror:supply pumpkin:fruit pea:fruit puzzle:supply",
    "material": "spoon:wood spoon:silver bottle:plastic fan:plastic radio:plastic printer:plastic phone:metal phone:plastic chair:metal "
    "bed:metal shelf:metal sofa:cotton glove:leather sock:cotton scarf:cotton coat:leather coat:cotton boot:rubber belt:cotton hat:wool "
    "flute:wood flute:metal knife:wood ruler:plastic ruler:metal ball:leather ball:plastic doll:plastic cup:glass plate:glass "
    "ladder:metal broom:wood rake:wood hammer:wood shovel:wood mop:wood clock:wood boat:metal boat:plastic car:glass bus:glass "
    "camera:plastic camera:glass brush:plastic lamp:metal umbrella:metal kite:plastic kite:nylon puzzle:wood doll:wood helmet:metal "
    "curtain:wool swing:wood swing:metal balloon:plastic rope:nylon drum:wood drum:metal mirror:metal piano:metal bottle:metal",
    "color": "apple:green apple:yellow grape:green plum:red rose:white rose:pink rose:yellow tulip:red tulip:yellow tulip:white "
    "tulip:purple chocolate:black chocolate:white coffee:brown onion:red onion:yellow onion:purple potato:yellow potato:red violet:white "
    "cherry:black butter:white daisy:yellow grass:brown carrot:purple pumpkin:green banana:green sun:orange sun:red spinach:red",
    "source": "apple:plant plum:plant lemon:plant cherry:plant grape:plant spinach:ground pea:plant pumpkin:plant pumpkin:ground "
    "carrot:plant potato:plant onion:plant rose:plant rose:ground spinach:plant pea:ground tulip:plant daisy:ground violet:ground "
    "grass:ground salt:mine milk:dairy butter:shop coffee:plant coffee:shop chocolate:plant coal:ground tulip:shop apple:shop milk:shop "
    "banana:tree banana:shop salt:ground tulip:meadow violet:meadow grass:plant sun:cloud snow:ground daisy:plant violet:plant snow:sky",
    "food": "cat:fish cat:rats cat:voles shark:fish penguin:fish penguin:shrimp eagle:fish eagle:mice eagle:rats eagle:voles pig:corn "
    "pig:carrots pig:acorns horse:grass horse:carrots horse:clover sheep:grass sheep:hay cow:hay cow:clover rabbit:grass rabbit:clover "
    "owl:mice owl:rats owl:moths frog:gnats frog:moths bat:flies bat:gnats snake:mice snake:voles duck:seeds duck:corn hen:seeds "
    "squirrel:seeds squirrel:corn whale:fish whale:shrimp salmon:flies salmon:krill monkey:seeds camel:grass camel:hay butterfly:nectar "
    "spider:flies spider:moths bee:pollen dog:scraps dog:rabbits parrot:bananas parrot:corn turtle:fish turtle:shrimp turtle:krill "
    "lion:rabbits snake:rabbits hen:scraps hen:grass duck:grass cow:corn ant:nectar hen:gnats duck:flies shark:jellyfish crocodile:rats "
    "crocodile:zebras sheep:weeds cow:weeds rabbit:weeds horse:weeds camel:weeds ant:scraps monkey:carrots hen:flies horse:corn",
    "home": "whale:deep_sea shark:ocean salmon:river frog:pond frog:river frog:stream duck:river duck:swamp duck:stream turtle:ocean "
    "turtle:pond crocodile:swamp dog:house cat:barn horse:barn horse:meadow hen:barn cow:meadow cow:stable sheep:barn sheep:pen pig:barn "
    "bat:hollow_tree bat:barn monkey:rain_forest parrot:jungle snake:savanna snake:desert snake:jungle snake:swamp snake:rain_forest "
    "squirrel:hollow_tree bee:garden bee:meadow bee:hollow_tree butterfly:meadow butterfly:rain_forest spider:house spider:garden "
    "spider:cave spider:barn rabbit:meadow rabbit:garden frog:garden frog:rain_forest turtle:river turtle:deep_sea penguin:ocean "
    "penguin:beach owl:barn owl:oak eagle:rocks camel:stable spider:rocks ant:garden duck:barn crocodile:rain_forest crocodile:pond",
    "ability": "duck:lay_eggs owl:lay_eggs penguin:lay_eggs eagle:lay_eggs parrot:lay_eggs frog:lay_eggs snake:lay_eggs turtle:lay_eggs "
    "crocodile:lay_eggs salmon:lay_eggs bee:lay_eggs ant:lay_eggs spider:lay_eggs butterfly:lay_eggs frog:hop lion:hunt_at_night "
    "bat:hunt_at_night cat:hunt_at_night bat:flutter parrot:soar_high dog:smell_blood sheep:give_milk pig:give_milk horse:give_milk "
    "camel:give_milk camel:pull_a_cart dog:roll_in_mud cow:pull_a_cart camel:roar squirrel:swing_through_trees snake:smell_blood "
    "snake:hunt_at_night snake:hang_upside_down crocodile:hunt_at_night spider:hang_upside_down monkey:hang_upside_down ant:make_honey "
    "squirrel:hop lion:roll_in_mud lion:purr rabbit:purr hen:flutter owl:soar_high bat:soar_high crocodile:smell_blood "
    "parrot:hang_upside_down owl:hop parrot:hop eagle:hop penguin:hop hen:hop duck:hop snake:go_long_without_water squirrel:bark "
    "turtle:go_long_without_water spider:hunt_at_night duck:slide_on_ice whale:give_milk shark:hunt_at_night bee:flutter owl:flutter",
    "young": "lion:kitten dog:cub",
    "need": "sick:went_to_bed cold:went_to_bed lazy:went_to_bed hot:drank_the_water sad:went_to_bed bored:went_to_bed "
    "dirty:drank_the_water "
    "curious:read_a_book clever:read_a_book lost:asked_many_questions curious:asked_for_the_way polite:told_the_truth lost:cried_for_hours "
    "sad:shouted_at_the_wall noisy:shouted_at_the_wall clever:told_the_truth honest:said_please clever:asked_many_questions "
    "careful:told_the_truth generous:said_please generous:told_the_truth careful:said_please brave:told_the_truth",
}
"""Further values that are true or nearly true ("_" for a space), so they are not offered as wrong options."""

ALIKE_FEELINGS = """proud joyful excited flattered amused thankful relieved
sad lonely disappointed guilty ashamed angry shocked worried
scared nervous worried lost shocked
tired bored impatient sick relieved
curious excited nervous
freezing sick"""
"""Feelings on one line can go together, so none is a wrong option for another."""
