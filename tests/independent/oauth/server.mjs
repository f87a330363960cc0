// An OAuth 2 server that is not ours (npm oidc-provider), for tests: strict rotation, and a refresh token that is used twice takes its
// whole family along. Clients prove themselves by private_key_jwt; access tokens are bound to the client's certificate (RFC 8705).
//
// One JSON document a line. The first line of standard input says how to set up; the answer is {"port": N}. Then:
//   {"mint": n}    n grants, each with a refresh token and an access token: {"tokens": [[access, refresh], …]}
//   {"lose": n}    of the next n token requests the answer is lost on its way, after the server has done its work
//   {"report": 1}  what the server has seen
// It listens on loopback only, and ends when standard input does.
import { createHash, X509Certificate } from 'node:crypto'
import { createServer } from 'node:https'
import { createInterface } from 'node:readline'

// Its notices belong to standard error: standard output is for our answers.
console.info = console.warn = console.error
const { Provider } = await import('oidc-provider')

const lines = createInterface({ input: process.stdin })[Symbol.asyncIterator]()
const settings = JSON.parse((await lines.next()).value)
const seen = { refreshes: 0, granted: 0, reused: 0, revoked: 0, refused: [], lost: 0 }
const used = new Map() // refresh token (as a digest) -> how often it came
let toLose = 0

class Memory {
  static models = new Map()
  constructor (model) {
    if (!Memory.models.has(model)) Memory.models.set(model, new Map())
    this.entries = Memory.models.get(model)
  }
  async upsert (id, payload) { this.entries.set(id, payload) }
  async find (id) { return this.entries.get(id) }
  async findByUid (uid) { return [...this.entries.values()].find((payload) => payload.uid === uid) }
  async findByUserCode () { return undefined }
  async consume (id) { this.entries.get(id).consumed = Math.floor(Date.now() / 1000) }
  async destroy (id) { this.entries.delete(id) }
  async revokeByGrantId (grantId) {
    for (const [id, payload] of this.entries) if (payload.grantId === grantId) this.entries.delete(id)
  }
}

const certificateOf = (ctx) => {
  const peer = ctx.socket.getPeerCertificate()
  return peer?.raw ? new X509Certificate(peer.raw) : undefined
}

const server = createServer({
  cert: settings.certificate, key: settings.key, ca: settings.ca, requestCert: true, rejectUnauthorized: true, minVersion: 'TLSv1.3'
})
await new Promise((resolve) => server.listen(0, '127.0.0.1', resolve))
const { port } = server.address()

const provider = new Provider(`https://127.0.0.1:${port}`, {
  adapter: Memory,
  clients: [{
    client_id: settings.clientId,
    token_endpoint_auth_method: 'private_key_jwt',
    token_endpoint_auth_signing_alg: 'ES256',
    jwks: { keys: [settings.clientKey] },
    grant_types: ['authorization_code', 'refresh_token'],
    response_types: ['code'],
    redirect_uris: ['https://app.example/callback'],
    tls_client_certificate_bound_access_tokens: true
  }],
  features: {
    devInteractions: { enabled: false },
    mTLS: { enabled: true, certificateBoundAccessTokens: true, getCertificate: certificateOf }
  },
  findAccount: async (ctx, id) => ({ accountId: id, claims: async () => ({ sub: id }) }),
  rotateRefreshToken: true,
  ttl: { AccessToken: settings.accessTokenSeconds, RefreshToken: 86400, Grant: 86400 }
})
provider.on('grant.success', () => { seen.granted += 1 })
provider.on('grant.revoked', () => { seen.revoked += 1 })
provider.on('grant.error', (ctx, error) => { seen.refused.push(`${error.error}: ${error.error_detail}`) })

provider.use(async (ctx, next) => {
  if (ctx.path === '/v1/probe') return probe(ctx)
  await next()
  if (ctx.path !== '/token') return
  seen.refreshes += 1
  const digest = createHash('sha256').update(ctx.oidc?.params?.refresh_token ?? '').digest('hex')
  used.set(digest, (used.get(digest) ?? 0) + 1)
  if (used.get(digest) > 1) seen.reused += 1
  if (toLose > 0) {
    toLose -= 1
    seen.lost += 1
    ctx.respond = false
    ctx.res.socket.destroy()
  }
})

// A resource behind the access token: does it live, and does it come over the certificate that it was issued to?
async function probe (ctx) {
  const token = await provider.AccessToken.find((ctx.get('authorization') ?? '').replace(/^Bearer /, ''))
  const certificate = certificateOf(ctx)
  const thumbprint = certificate && createHash('sha256').update(certificate.raw).digest('base64url')
  ctx.status = token && token['x5t#S256'] === thumbprint ? 200 : 401
  ctx.body = { account: token?.accountId ?? null }
}

async function mint (count) {
  const client = await provider.Client.find(settings.clientId)
  const tokens = []
  for (let number = 0; number < count; number += 1) {
    const accountId = `owner-${number}`
    const grant = new provider.Grant({ accountId, clientId: settings.clientId })
    grant.addOIDCScope('offline_access')
    const grantId = await grant.save()
    const shared = { accountId, client, grantId, gty: 'authorization_code', scope: 'offline_access' }
    const access = new provider.AccessToken(shared)
    access.setThumbprint('x5t', new X509Certificate(settings.clientCertificate))
    const refresh = new provider.RefreshToken({ ...shared, authTime: Math.floor(Date.now() / 1000) })
    tokens.push([await access.save(), await refresh.save()])
  }
  return { tokens }
}

server.on('request', provider.callback())
console.log(JSON.stringify({ port }))
for (let line = await lines.next(); !line.done; line = await lines.next()) {
  const wanted = JSON.parse(line.value)
  if (wanted.mint) console.log(JSON.stringify(await mint(wanted.mint)))
  else if (wanted.lose) { toLose = wanted.lose; console.log('{}') } else console.log(JSON.stringify(seen))
}
process.exit(0)
