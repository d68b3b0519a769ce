import math, sys, time, json, argparse
import numpy as np, torch, torch.nn.functional as F
from shared.gpt import GPTConfig, GPTModel
from shared.tales import TaleGenerator, entropy
from shared.tale_tokenizer import tale_encoding
ap=argparse.ArgumentParser()
ap.add_argument('--dim',type=int,default=128); ap.add_argument('--layers',type=int,default=4); ap.add_argument('--heads',type=int,default=4)
ap.add_argument('--steps',type=int,default=1000); ap.add_argument('--batch',type=int,default=32)
ap.add_argument('--lr',type=float,default=0.02); ap.add_argument('--alr',type=float,default=0.003)
ap.add_argument('--wd',type=float,default=0.01); ap.add_argument('--mode',default='stories'); ap.add_argument('--qk',type=int,default=1)
ap.add_argument('--bf16',type=int,default=0); ap.add_argument('--nstories',type=int,default=100000); ap.add_argument('--warm',type=int,default=50); ap.add_argument('--decay',type=float,default=0.5)
ap.add_argument('--opt',default='muon'); ap.add_argument('--seed',type=int,default=0); ap.add_argument('--ns',type=int,default=5); ap.add_argument('--seenonly',type=int,default=0); ap.add_argument('--lam',type=float,default=0); ap.add_argument('--lamsteps',type=int,default=0); ap.add_argument('--maxfreq',type=float,default=0.004); ap.add_argument('--fng',type=float,default=0); ap.add_argument('--load',default=''); ap.add_argument('--mov',type=float,default=0); ap.add_argument('--mqk',type=float,default=0); ap.add_argument('--rep',type=float,default=0); ap.add_argument('--repsteps',type=int,default=0); ap.add_argument('--embstd',type=float,default=0); ap.add_argument('--tag',default='last'); ap.add_argument('--extra',default='{}')
a=ap.parse_args(); torch.set_num_threads(1); torch.manual_seed(a.seed)
e=tale_encoding(); EOT=e.eot_token
def enc(seed,n): 
    g=TaleGenerator(seed); return [np.array([EOT]+e.encode_ordinary(s.text)+[EOT]) for s in g.stories(n)]
val=enc(999,200); tr=enc(1,a.nstories)
floor=entropy()
from shared.tales import TaleGenerator as TG
vfloor=np.mean([-s.log_probability for s in TG(999).stories(200)])
cfg=GPTConfig.preset('tales-1m',emb_dim=a.dim,n_layers=a.layers,n_heads=a.heads,qk_norm=bool(a.qk),**json.loads(a.extra))
m=GPTModel(cfg); print('params',m.n_parameters, 'floor',floor, vfloor,flush=True)
with torch.no_grad():
    for b in m.blocks:
        at=b.attention; D=a.dim; W=at.qkv.weight
        if a.mov: at.output.weight.copy_(a.mov*W[2*D:].T)
        if a.mqk: W[D:2*D]=a.mqk*W[:D]+(1-a.mqk)*W[D:2*D]
if a.fng: torch.nn.init.constant_(m.final_norm.weight,a.fng)
if a.embstd: torch.nn.init.normal_(m.token_embedding.weight,std=a.embstd)
import os
for _p in ('/proc/self/autogroup',):
    open(_p,'w').write('-12')
os.nice(-12)
if a.load.startswith('/'):
    from safetensors.torch import load_file
    print(m.load_state_dict(load_file(a.load),strict=False))
elif a.load: m.load_state_dict(torch.load(f'/tmp/exp/{a.load}.pt'))
CAP=torch.tensor([e.decode([t]).strip()[:1].isupper() if t!=EOT else False for t in range(2048)])
def pad(rows):
    L=max(map(len,rows)); x=np.full((len(rows),L),EOT); y=np.full((len(rows),L),-100)
    for i,r in enumerate(rows): x[i,:len(r)]=r; y[i,:len(r)-1]=r[1:]
    return torch.from_numpy(x[:,:-1].copy()).long(), torch.from_numpy(y[:,:-1].copy()).long()
def evaluate():
    m.eval(); t=0; sc=0; nc=0
    with torch.no_grad():
        for i in range(0,len(val),50):
            x,y=pad(val[i:i+50]); l=F.cross_entropy(m(x).flatten(0,1),y.flatten(),ignore_index=-100,reduction='none').view_as(y); t+=l.sum().item()
            seen=(x[:,None,:]==y[:,:,None]).tril().any(-1)&(y>=0)&CAP[y.clamp(min=0)]; sc+=l[seen].sum().item(); nc+=seen.sum().item()
    m.train(); print('   seen-cap',round(sc/nc,3),end=' '); return t/len(val)
def orth(g,steps):
    # batched: g (n, r, c)
    X=g/(g.norm(dim=(-2,-1),keepdim=True)+1e-7); tp=X.shape[-2]>X.shape[-1]
    if tp: X=X.mT
    for _ in range(steps):
        A=X@X.mT; B=-4.7750*A+2.0315*A@A; X=3.4445*X+B@X
    return X.mT if tp else X
mats=[p for n,p in m.named_parameters() if p.dim()==2 and n.startswith('blocks')]
other=[p for n,p in m.named_parameters() if not(p.dim()==2 and n.startswith('blocks'))]
if a.opt=='adamw': other=other+mats; mats=[]
adam=torch.optim.AdamW([{'params':[p for p in other if p.dim()==2],'weight_decay':a.wd},{'params':[p for p in other if p.dim()<2],'weight_decay':0}],lr=a.alr,betas=(0.9,0.95),eps=1e-10)
mom=[torch.zeros_like(p) for p in mats]
groups={}
for i,p in enumerate(mats): groups.setdefault(tuple(p.shape),[]).append(i)
def sched(s):
    if s<a.warm: return (s+1)/a.warm
    d=int(a.steps*a.decay)
    return 1 if s<a.steps-d else max(0.0,(a.steps-s)/d)
rng=np.random.default_rng(0); flat=np.concatenate([t[1:] for t in tr]); order=rng.permutation(len(tr)); pos=0
cnt=np.bincount(flat,minlength=2048)/len(flat); RARE=torch.from_numpy(cnt<a.maxfreq)
lens=np.array([len(t) for t in tr])
t0=time.process_time(); tok=0
for s in range(a.steps):
    if a.mode=='stories':
        if s%8==0:
            if pos+8*a.batch>len(order): order=rng.permutation(len(tr)); pos=0
            idx=order[pos:pos+8*a.batch]; pos+=8*a.batch; idx=idx[np.argsort(lens[idx])].reshape(8,a.batch); perm=rng.permutation(8)
        rows=[tr[i] for i in idx[perm[s%8]]]
        if s<a.repsteps:
            for j in range(int(a.rep*len(rows))):
                r=rows[j][1:-1]; n=110; o=rng.integers(0,len(r)-n+1); c=r[o:o+n]; rows[j]=np.concatenate([[EOT],c,[EOT],c,[EOT]])
        x,y=pad(rows)
    else:
        st=rng.integers(0,len(flat)-257,a.batch); w=np.stack([flat[i:i+257] for i in st]); w=torch.from_numpy(w).long(); x,y=w[:,:-1],w[:,1:]
    if a.seenonly:
        sn=(x[:,None,:]==y[:,:,None]).tril().any(-1)&(CAP if a.seenonly==1 else RARE)[y.clamp(min=0)]; y=torch.where(sn,y,-100)
    tok+=int((y>=0).sum())
    f=sched(s)
    with torch.autocast('cpu',torch.bfloat16,enabled=bool(a.bf16)):
        lg=m(x).flatten(0,1).float()
        if a.lam and s<a.lamsteps:
            sn=(x[:,None,:]==y[:,:,None]).tril().any(-1)&RARE[y.clamp(min=0)]&(y>=0)
            l=F.cross_entropy(lg,y.flatten(),ignore_index=-100,reduction='none'); w=(1+a.lam*sn.float()).flatten()
            loss=(l*w).sum()/(y>=0).sum()
            if s%200==0: print('rare-seen/row',sn.sum().item()/len(x))
        else: loss=F.cross_entropy(lg,y.flatten(),ignore_index=-100)
    loss.backward()
    for g in adam.param_groups: g['lr']=a.alr*f
    adam.step()
    with torch.no_grad():
        for shp,ii in groups.items():
            G=torch.stack([mats[i].grad for i in ii]); M=torch.stack([mom[i] for i in ii]); M.lerp_(G,0.05)
            for j,i in enumerate(ii): mom[i]=M[j]
            U=orth(G.lerp(M,0.95),a.ns); sc=max(1,shp[0]/shp[1])**0.5
            for j,i in enumerate(ii): mats[i].mul_(1-a.lr*f*a.wd); mats[i].add_(U[j],alpha=-a.lr*f*sc)
    m.zero_grad(set_to_none=True)
    if (s+1)%max(1,a.steps//10)==0:
        tt=time.process_time()-t0; v=evaluate(); print(f'{s+1} train {loss.item():.4f} val/story {v:.3f} = {100*(v/vfloor-1):.2f}% over; tok {tok/1e6:.2f}M {tok/tt:.0f} tok/s cpu {tt:.0f}s',flush=True); t0+=time.process_time()-t0-tt
torch.save(m.state_dict(),f'/tmp/exp/{a.tag}.pt')
