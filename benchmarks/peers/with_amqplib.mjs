// Node's raw amqplib, as a limit: persistent, mandatory, confirmed publishes; JSON parsed and each message acked.
// node with_amqplib.mjs one|many|consume JOBS; BENCH_URL, BENCH_QUEUE, BENCH_KIND, BENCH_BYTES, BENCH_NODE (where amqplib is installed)
import { createRequire } from 'node:module';

const amqplib = createRequire(`${process.env.BENCH_NODE}/`)('amqplib');
const { BENCH_URL: url, BENCH_QUEUE: queue, BENCH_KIND: kind } = process.env;
const [role, jobs] = [process.argv[2], Number(process.argv[3])];
const WINDOW = 1000, PREFETCH = 200, WARM_UP = 50;
const text = 'x'.repeat(Math.max(0, Number(process.env.BENCH_BYTES) - 80));

const connection = await amqplib.connect(url);
const quorum = { 'x-queue-type': 'quorum' };
const declare = (channel) => channel.assertQueue(queue, { durable: true, arguments: kind === 'classic' ? { 'x-max-priority': 6 } : quorum });

function stopwatch() {
  const cpu = process.cpuUsage(), begun = process.hrtime.bigint();
  return (count) => {
    const seconds = Number(process.hrtime.bigint() - begun) / 1e9, used = process.cpuUsage(cpu);
    return { per_s: count / seconds, cpu_us: (used.user + used.system) / count };
  };
}

if (role === 'consume') {
  const channel = await connection.createChannel();
  await declare(channel);
  await channel.prefetch(PREFETCH);
  let left = jobs, watch;
  const row = await new Promise((resolve, reject) => {
    channel.on('error', reject);
    channel.consume(queue, (message) => {
      watch ??= stopwatch();
      JSON.parse(message.content);
      channel.ack(message);
      if (!--left) resolve(watch(jobs));
    });
  });
  await new Promise((resolve) => setTimeout(resolve, 500)); // a channel that closes at once takes acks with it that its quorum queue hasn't had
  await channel.close();
  console.log(JSON.stringify({ ran: jobs - left, ...row }));
} else {
  const channel = await connection.createConfirmChannel();
  await declare(channel);
  let returned = 0, sent = 0;
  channel.on('return', () => { returned += 1; });
  const publish = (done) => {
    const body = Buffer.from(JSON.stringify({ at: 0, order_id: 7, email: 'a@example.org', text, tags: ['a', 'b'] }));
    channel.sendToQueue(queue, body, {
      persistent: true, mandatory: true, contentType: 'application/json', messageId: String(sent++).padStart(28, '0'), type: 'invoice.send',
      timestamp: Math.floor(Date.now() / 1000), appId: 'bench', priority: kind === 'classic' ? 4 : undefined,
    }, done);
  };
  const many = (count, window) => new Promise((resolve, reject) => {
    let begun = 0, confirmed = 0;
    const done = (error) => {
      if (error) { reject(error); return; }
      if (++confirmed === count) resolve(); else more();
    };
    const more = () => { while (begun < count && begun - confirmed < window) { begun += 1; publish(done); } };
    more();
  });
  const window = role === 'one' ? 1 : WINDOW;
  await many(WARM_UP, window);
  const watch = stopwatch();
  await many(jobs, window);
  const row = watch(jobs);
  await channel.close();
  if (returned) throw new Error(`${returned} messages were returned`);
  console.log(JSON.stringify({ sent: jobs + WARM_UP, ...row }));
}
await connection.close();
