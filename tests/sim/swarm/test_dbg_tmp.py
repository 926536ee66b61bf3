from test_buddies import *
from conftest import *
def test_dbg(simulate, identity):
    async def story(swarm):
        d=identity(5).peer_id
        swarm.network.partition([d])
        for s in range(34):
            await asyncio.sleep(1)
            print(s+1, [n for n,m in swarm.members.items() if d in m.buddies.testified], [n for n,m in swarm.members.items() if d in m.view.lost], {n: len(m.view.accused.get(d,())) for n,m in swarm.members.items()}, len(swarm.members[1].view.records()))
    simulate(story)
